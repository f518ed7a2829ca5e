import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Pretraining")


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    # How does noise become words, and what would the same run cost on 8 H200?

    **Pretraining** shows a model text and asks, at every place, for the next token. It begins as a
    jumble of pieces. Watch it find the common ones, then their order, then the shape of a talk. In the
    editor, the cells whose code you see are the whole program: `primechat export 05` turns them into a script
    for rented GPUs.
    """)
    return


@app.cell(hide_code=True)
def _():
    import marimo as mo

    return (mo,)


@app.cell(hide_code=True)
def _():
    from primechat.exercises.pretraining import EXERCISES
    from primechat.labkit.instruments import pretraining as bench
    from primechat.labkit.lab import Live, announce, exercise, in_notebook, predict, show

    return EXERCISES, Live, announce, bench, exercise, in_notebook, predict, show


@app.cell(hide_code=True)
def _(announce):
    notice = announce("The controls appear in a few seconds.")
    notice
    return (notice,)


@app.cell
def _():
    from primechat import PretrainConfig, pretrain
    from primechat.config import GPTConfig
    from primechat.labkit.lab import settings, stage, summary

    return GPTConfig, PretrainConfig, pretrain, settings, stage, summary


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 1. Choose

    A model is a stack of blocks. `n_layer` is their number; each works over once more what the one before
    it made of the text. The other switches are tricks of the trade, each of which can be turned off.
    """)
    return


@app.cell
def _(GPTConfig, PretrainConfig, settings):
    start = PretrainConfig(
        tag="lab05",
        model=GPTConfig.modern(2, vocab_size=2048, sequence_len=128, head_dim=64),
        batch_tokens=2048,
        seconds=30,
    )
    form = settings(start, ("tag", "seconds", "model.n_layer", "batch_tokens"), title="The run")
    form
    return form, start


@app.cell(hide_code=True)
def _(Live, bench, form, notice, show):
    notice.end()
    show(Live(lambda: bench.describe_plan(form.config)))
    return


@app.cell(hide_code=True)
def _(predict):
    predict(
        "Before its first step the model gives each of its 2,048 tokens the same chance. What is its "
        "loss, in nats a token?",
        ["0.7", "2.0", "7.6", "2048"],
        "7.6",
        why="The surprise at one of 2,048 equally likely tokens is ln 2048 = 7.6 nats; the first point of "
        "the curve below is there.",
    )
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 2. Train

    The **loss** is the surprise at the true next token; bits per byte (**bpb**) is the same in a unit that
    does not depend on the tokens. Both fall as it learns. The samples go on from the same words each time.
    Stop saves; Go on resumes, and the curve continues.
    """)
    return


@app.cell
def _(form, pretrain, stage):
    run = stage(pretrain, form.config, title="Pretraining")
    run
    return (run,)


@app.cell
def _(run, summary):
    summary(run)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 3. Lay runs over each other

    Name runs with commas between, also folders that came back from a rented machine (`primechat pull
    USER@HOST:base/d20`). `primechat report base/lab05` writes one as a page.
    """)
    return


@app.cell(hide_code=True)
def _(Live, bench, run, show):
    _newest = ", ".join(bench.list_runs()[:3]) if run is not None else ""
    show(Live(bench.overlay_runs, runs=_newest))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 4. Take a trick away

    Does a trick help, or was it luck? Each is switched off alone, at equal steps, over the same **seeds**
    (the numbers from which first weights and the order of the text are drawn). The table gives no verdict
    below three seeds, and it is strict: where no trick matters, it names one in at most 5 % of the cases, as
    many tricks as you compare (paired t-tests, corrected by Holm). So with three seeds only large effects
    show; what is *not shown to matter* may still matter a little. More seeds show more.

    The single numbers and gates that belong to the tricks learn at nanochat's own rates here, up to a hundred
    times as fast as in the run above: a trick that may hardly move cannot show what it does.
    """)
    return


@app.cell(hide_code=True)
def _(bench, in_notebook, settings, start):
    tricks = (
        settings(bench.AblationConfig(base=start), ("switches", "seeds", "steps", "rates"))
        if in_notebook()
        else None
    )
    tricks
    return (tricks,)


@app.cell(hide_code=True)
def _(Live, bench, run, show, tricks):
    show(
        Live(lambda: bench.describe_ablation(tricks.config, run.result))
    ) if tricks is not None else None
    return


@app.cell(hide_code=True)
def _(bench, stage, tricks):
    trial = stage(bench.ablate, tricks.config, title="Ablation") if tricks is not None else None
    trial
    return (trial,)


@app.cell(hide_code=True)
def _(Live, bench, show, trial):
    show(
        Live(lambda: bench.judge_ablation(trial.result, trial.state))
    ) if trial is not None else None
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 5. Send this very lab to 8 H200

    The folder holds the cells whose code the editor shows as a script, the settings of the full run, a
    launcher and the library. It is tried here first, with two processes.

    The full run is not the small one above but a **recipe**, all settings of a run under one name.
    `october2025` is nanochat's speedrun of that month: 20 blocks, a vocabulary of 65,536 instead of 2,048,
    rows of 2,048 tokens, web pages (FineWeb-Edu), 20 tokens for each parameter. What it costs has been
    measured. `nanochat2026` is its code of July 2026, with the tricks of the run above; it reads 12 tokens
    for each parameter of the blocks and the head, about half as many. In a terminal it is
    `primechat export 05 --recipe nanochat2026`.
    """)
    return


@app.cell(hide_code=True)
def _(bench, in_notebook, settings):
    parcel = (
        settings(bench.FolderConfig(), ("depth", "recipe", "gpus", "output", "rehearse"))
        if in_notebook()
        else None
    )
    parcel
    return (parcel,)


@app.cell(hide_code=True)
def _(bench, parcel, stage):
    folder = (
        stage(bench.write_folder("05"), parcel.config, title="Write the folder")
        if parcel is not None
        else None
    )
    folder
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 6. Work it out yourself
    """)
    return


@app.cell(hide_code=True)
def _(EXERCISES, exercise):
    def bits_per_byte(nats, n_bytes): ...

    exercise(EXERCISES[0], bits_per_byte)
    return


@app.cell(hide_code=True)
def _(EXERCISES, exercise):
    def lr_share(step, steps): ...

    exercise(EXERCISES[1], lr_share)
    return


if __name__ == "__main__":
    app.run()
