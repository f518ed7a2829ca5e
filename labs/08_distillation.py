import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Distillation")


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    # What does a small student keep of its teacher, and what does it lose?

    A small model can learn from text, as the large one did. It can also learn from the large one: at each
    place the **teacher** tells how likely it holds every token, which is more than the one token that the
    text has. This is **distillation**; the small model is the **student**. In the editor, the cells whose
    code you see are the whole program: `primechat export 08` turns them into a script for rented GPUs.
    """)
    return


@app.cell(hide_code=True)
def _():
    import marimo as mo

    from primechat.exercises.distillation import EXERCISES
    from primechat.labkit.instruments import posttrain
    from primechat.labkit.lab import exercise, predict, show
    from primechat.views.training import draw_lines

    return EXERCISES, draw_lines, exercise, mo, posttrain, predict, show


@app.cell
def _():
    from primechat import DistillConfig, distill
    from primechat.config import EvalConfig, RuntimeConfig
    from primechat.labkit.lab import settings, stage, summary

    return DistillConfig, EvalConfig, RuntimeConfig, distill, settings, stage, summary


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 1. How small?

    The student has the teacher's vocabulary and context, and fewer, narrower layers. With a vocabulary of
    65,536 tokens the two tables of tokens alone weigh 2 × 65,536 × width numbers, so a small student must
    be narrow. Its heads are narrower too, so that its width can be chosen in finer steps: that is why the
    half student has more of them than its teacher.
    """)
    return


@app.cell(hide_code=True)
def _(posttrain, predict):
    halved = "Half the width and half the layers: how many of the teacher's numbers are left, in percent?"
    predict(
        halved,
        (0.0, 100.0),
        posttrain.guess_halved("shipped/base"),
        why="The blocks shrink to about an eighth, as width counts twice in them; the tables of tokens only "
        "to a half. The smaller a model, the more of it is tables.",
        within=5.0,
        unit="%",
    )
    return (halved,)


@app.cell(hide_code=True)
def _(halved, posttrain, show):
    show(posttrain.open_sizes("shipped/base"), after=halved)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 2. Teach one

    The loss is `alpha` times the plain loss on the text, and the rest on the distance to the teacher, both
    softened by a **temperature**: above 1, small probabilities count for more. **Retention** is the share of
    the teacher's gain over an untrained model that the student has: 1 means as good as the teacher, 0 no
    better than untrained, and a little below 0, as after the first steps, a little worse than that.
    """)
    return


@app.cell
def _(DistillConfig, EvalConfig, RuntimeConfig, settings):
    start = DistillConfig(
        tag="student",
        teacher="shipped/base",
        size="quarter",
        steps=40,
        batch_tokens=2048,
        runtime=RuntimeConfig(compile="off"),
        eval=EvalConfig(snapshots=False),
    )
    form = settings(
        start, ("tag", "size", "steps", "alpha", "temperature", "loss"), title="Student"
    )
    form
    return (form,)


@app.cell
def _(distill, form, stage):
    run = stage(distill, form.config, title="Teach the student")
    run
    return (run,)


@app.cell
def _(run, summary):
    summary(run)
    return


@app.cell(hide_code=True)
def _(draw_lines, posttrain, run, show):
    show(
        draw_lines(
            posttrain.list_retention(run.result),
            "step",
            "share",
            title="Along training: how much of the teacher it has, how often both guess the same",
        )
    )
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 3. Where is it lost?

    The same texts, sorted by how frequent the token is, by how much had been read before it, and by its kind.
    Where is the small model nearly as good, and where does it fall behind?
    """)
    return


@app.cell(hide_code=True)
def _(form, posttrain, run, show):
    show(posttrain.open_breakdown(run.result, form.config.teacher))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    Here the teacher answers you, and every token is tinted by how far apart the two models were before it.
    """)
    return


@app.cell(hide_code=True)
def _(form, posttrain, run, show):
    show(posttrain.open_heat(posttrain.pick_student(run.result), form.config.teacher))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 4. Does the teacher help? Does size?

    Students of several sizes, each **taught**, and each trained **alone** on the text with as many steps and
    tokens: the control. Each is run from several **seeds** (the first weights, the order of the text). With
    three seeds or more, `±` is a 95 % interval of their mean; where two intervals overlap widely, nothing is
    shown. `agreement` is how often student and teacher guess the same token.

    The last two columns are about what it writes. `distinct-2` is the share of word pairs that differ among
    all that it wrote, `repetition` the share that a text had already. Noise is varied, too: good is near the
    text itself, not high.
    """)
    return


@app.cell(hide_code=True)
def _(posttrain, settings):
    plan = settings(
        posttrain.SeriesConfig(
            names="eighth taught, eighth alone, half taught, half alone", seeds=3
        ),
        ("names", "seeds", "steps"),
        title="What to compare",
    )
    plan
    return (plan,)


@app.cell(hide_code=True)
def _(plan, posttrain, stage):
    series = stage(posttrain.compare_sizes, plan.config, title="Sizes, with and without a teacher")
    series
    return (series,)


@app.cell(hide_code=True)
def _(plan, posttrain, series, show):
    _keys = ("val_bpb", "retention", "agreement", "kl_nats", "distinct-2", "repetition")
    _rows = posttrain.add_teacher(series.result, plan.config.model)
    show(posttrain.open_table(_rows, _keys, diversity=False))
    return


@app.cell(hide_code=True)
def _(draw_lines, posttrain, series, show):
    show(
        draw_lines(
            posttrain.list_by_size(series.result),
            "parameters of the student",
            "retention",
            title="Retention by size: means over the seeds, with intervals",
            faint=("alone",),
        )
    )
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 5. Exercises

    In the editor, replace the `...` in each cell and run it: the card says which rule does not hold yet.
    """)
    return


@app.cell
def _(EXERCISES, exercise):
    def measure_gap(student, teacher, temperature): ...

    exercise(EXERCISES[0], measure_gap)
    return


@app.cell
def _(EXERCISES, exercise):
    def bucket(p, k): ...

    exercise(EXERCISES[1], bucket)
    return


@app.cell
def _(EXERCISES, exercise):
    def measure_retention(untrained, student, teacher): ...

    exercise(EXERCISES[2], measure_retention)
    return


if __name__ == "__main__":
    app.run()
