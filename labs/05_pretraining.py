import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Pretraining")


@app.cell(hide_code=True)
def _():
    import marimo as mo

    return (mo,)


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    # How does noise become words, and what would the same run cost on 8 H200?

    **Pretraining** shows a model text and asks, at every place, for the next token. It begins as noise.
    Watch it learn letters, then words, then the shape of a talk. The cells whose code you see are the whole
    program: `primechat export 05` turns them into a script for rented GPUs.
    """)
    return


@app.cell
def _():
    from primechat import PretrainConfig, pretrain
    from primechat.config import GPTConfig
    from primechat.lab import settings, stage, summary

    return GPTConfig, PretrainConfig, pretrain, settings, stage, summary


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 1. Choose

    A model is a stack of blocks. `n_layer` is their number; each widens what the model can keep in mind. The
    other switches are tricks of the trade, each of which can be turned off.
    """)
    return


@app.cell
def _(GPTConfig, PretrainConfig, settings):
    start = PretrainConfig(
        tag="lab05",
        model=GPTConfig.modern(2, vocab_size=2048, sequence_len=128, head_dim=64),
        batch_tokens=2048,
        seconds=60,
    )
    form = settings(start, ("tag", "seconds", "model.n_layer", "batch_tokens"), title="The run")
    form
    return form, start


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 2. Train

    The **loss** is the surprise at the true next token; bits per byte (**bpb**) is the same in a unit that
    does not depend on the tokens. Both fall as it learns.
    """)
    return


@app.cell
def _(form, pretrain, stage):
    run = stage(pretrain, form.config, title="Pretraining")
    run
    return (run,)


@app.cell
def _(run, summary):
    summary(run.result)
    return


if __name__ == "__main__":
    app.run()
