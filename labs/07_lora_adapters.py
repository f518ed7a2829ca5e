import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="LoRA adapters")


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    # How small a change turns my model into a pirate?

    Training moves every number of a model. **LoRA** leaves them all where they are and hangs two thin
    matrices (tables of numbers) beside each big one; only these learn. The result is a small file, an
    **adapter**, that can be taken off again, mixed with others, or turned up and down like a volume. In the
    editor, the cells whose code you see are the whole program: `primechat export 07` turns them into a
    script for rented GPUs.
    """)
    return


@app.cell(hide_code=True)
def _():
    import marimo as mo

    from primechat.exercises.lora_adapters import EXERCISES
    from primechat.labkit.instruments import posttrain
    from primechat.labkit.lab import exercise, predict, show
    from primechat.views.training import draw_lines, draw_tradeoff

    return EXERCISES, draw_lines, draw_tradeoff, exercise, mo, posttrain, predict, show


@app.cell
def _():
    from primechat import LoRAConfig, train_lora
    from primechat.config import EvalConfig, RuntimeConfig
    from primechat.labkit.lab import settings, stage, summary

    return LoRAConfig, EvalConfig, RuntimeConfig, settings, stage, summary, train_lora


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 1. Train one, and turn the dial

    The talks are the chats that ship with primechat, answered as a pirate would: a **recipe**. Others are
    `style:polite`, `topic:music` (or `topic:` and words of your own), `faq`, and `faq:` with a file of lines
    `question|answer` that you write. The **rank** is how many numbers wide the thin matrices are.
    """)
    return


@app.cell
def _(LoRAConfig, EvalConfig, RuntimeConfig, settings):
    start = LoRAConfig(
        tag="pirate",
        base="shipped/sft",
        dialogues="style:pirate",
        rank=8,
        alpha=16.0,
        steps=40,
        batch_tokens=2048,
        runtime=RuntimeConfig(compile="off"),
        eval=EvalConfig(snapshots=False),
    )
    form = settings(start, ("tag", "dialogues", "rank", "steps"), title="Adapter")
    form
    return (form,)


@app.cell
def _(form, stage, train_lora):
    run = stage(train_lora, form.config, title="Train the adapter")
    run
    return (run,)


@app.cell
def _(run, summary):
    summary(run)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    At 0 the model is exactly what it was; at 1 it is as trained; at 2 there is twice as much of the change.
    Drag, and read the reply.
    """)
    return


@app.cell(hide_code=True)
def _(form, posttrain, run, show):
    show(posttrain.open_dial(posttrain.list_adapters(run.result), form.config.base))
    return


@app.cell(hide_code=True)
def _(form, posttrain, predict):
    predict(
        "How large is this adapter, in percent of the model's own numbers?",
        (0.0, 100.0),
        lambda: posttrain.measure_share(form.config),
        why="The big matrices stay as they are; of each one only rank × (inputs + outputs) numbers are new.",
        within=2.0,
        unit="%",
    )
    return


@app.cell(hide_code=True)
def _(draw_lines, posttrain, run, show):
    show(
        draw_lines(
            posttrain.list_curves(run.result),
            "step",
            "bits per byte (lower is better)",
            title="What it gains, and what it forgets",
        )
    )
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 2. How much rank does it need?

    Adapters of several ranks and **full fine-tuning** (every number moves), each with the same steps, tokens
    and seeds. `gain` is on the pirate's held-back talks, `forgotten` on plain text, both in **bits
    per byte** (how surprised the model is by new text). Does an adapter forget less? Not in a run as short
    as the one below: with its 12 steps and three seeds, rank 8 had 97 % of the gain of full fine-tuning and
    had forgotten as much (107 %, 95 % interval 88 to 126). With 60 steps it had 95 % of the gain and had
    forgotten 44 % as much (35 to 53; both in labs/experiments.md). The line below the table says it of yours.
    """)
    return


@app.cell(hide_code=True)
def _(posttrain, settings):
    plan = settings(
        posttrain.SeriesConfig(model="shipped/sft", names="1, 8, full"),
        ("names", "seeds", "steps"),
        title="What to compare",
    )
    plan
    return (plan,)


@app.cell(hide_code=True)
def _(plan, posttrain, stage):
    series = stage(posttrain.compare_ranks, plan.config, title="Ranks against full fine-tuning")
    series
    return (series,)


@app.cell(hide_code=True)
def _(posttrain, series, show):
    show(
        posttrain.open_table(
            series.result, ("gain", "forgotten", "seconds", "optimizer MB"), diversity=False
        )
    )
    return


@app.cell(hide_code=True)
def _(posttrain, series, show):
    show(posttrain.compare_with_full(series.result))
    return


@app.cell(hide_code=True)
def _(draw_tradeoff, posttrain, series, show):
    show(
        draw_tradeoff(
            posttrain.name_axes(series.result),
            "gain on its own talks, bits per byte",
            "forgotten of general text, bits per byte",
            title="Right is better, low is better; a dot is a seed",
        )
    )
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 3. Is the change really of low rank?

    Any matrix is a sum of simple ones, each with a weight, its **singular value**; the squares of these
    weights are the shares of the whole. The picture adds the shares up, the largest first. An adapter of rank
    8 is complete after eight; a change of low rank would be nearly so. The dotted line is a matrix of random
    numbers, of no rank but the full one. The matrix, `c_fc`, is in the model's first layer, where it works on
    each token alone.

    Full fine-tuning follows the dotted line, but that does not say that pirates need a high rank. Its
    optimizer, **Muon**, gives all directions of a step the same size on purpose, whatever the task. The
    control is the same training, from the same model, by **AdamW**, which does not: there the first few
    parts hold most of the change.
    """)
    return


@app.cell(hide_code=True)
def _(draw_lines, plan, posttrain, series, show):
    show(
        draw_lines(
            posttrain.find_spectra(series.result, plan.config),
            "how many singular values, the largest first",
            "share of the change, %",
            title="What was added to one matrix",
            faint=("random numbers",),
        )
    )
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 4. Exercises

    In the editor, replace the `...` in each cell and run it: the card says which rule does not hold yet.
    """)
    return


@app.cell
def _(EXERCISES, exercise):
    def adapt(x, w, a, b, scale): ...

    exercise(EXERCISES[0], adapt)
    return


@app.cell
def _(EXERCISES, exercise):
    def count_numbers(n_in, n_out, rank): ...

    exercise(EXERCISES[1], count_numbers)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## More

    An adapter's folder, `lora_checkpoints/<tag>/`, holds `adapter_config.json` and
    `adapter_model.safetensors`: the files of the package `peft`, which reads ours and writes ones that open
    here. `primechat chat lora:pirate` talks to the model that the adapter `pirate` was trained on, with it;
    `lora:pirate*0.5+lora:music+shipped/sft` to a model with two, the first at half strength.
    """)
    return


if __name__ == "__main__":
    app.run()
