import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Chat fine-tuning")


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    # Which conversations make a better talker?

    A **base model** goes on with any text. To make it answer, it is trained a little longer on conversations:
    this is **fine-tuning**. What it becomes depends on which conversations it sees. Here you read them, mix
    them, train on your mixture and compare, without one question of a benchmark: those are for measuring,
    and a model that trained on them would only seem clever. In the editor, the cells whose code you see
    are the whole program: `primechat export 06` turns them into a script for rented GPUs.
    """)
    return


@app.cell(hide_code=True)
def _():
    import marimo as mo

    from primechat import load_tokenizer
    from primechat.exercises.chat_finetuning import EXERCISES
    from primechat.labkit.instruments import posttrain
    from primechat.labkit.lab import exercise, predict, show
    from primechat.views.training import draw_lines, draw_tradeoff

    return (
        EXERCISES,
        draw_lines,
        draw_tradeoff,
        exercise,
        load_tokenizer,
        mo,
        posttrain,
        predict,
        show,
    )


@app.cell
def _():
    from primechat import FinetuneConfig, finetune
    from primechat.config import EvalConfig, RuntimeConfig
    from primechat.labkit.lab import settings, stage, summary

    return FinetuneConfig, EvalConfig, RuntimeConfig, finetune, settings, stage, summary


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 1. Read before you train

    Pick a set and leaf through ten of its talks, drawn at random. They are cut into **tokens**, the pieces of
    words that a model reads and writes; those in `<| |>` mark who speaks. The model learns from the **lit**
    tokens only: they are what the assistant says. The rest it reads, so that it knows what it answers. The
    sliders set how often a set is gone through. The dashed sets, further down the list, are public ones that
    are not on this machine; their licence is said before anything is fetched.
    """)
    return


@app.cell(hide_code=True)
def _(load_tokenizer, posttrain, show):
    tokenizer = load_tokenizer("shipped/base")
    learned = "In a chat of two people, about which share of the tokens is learned from?"
    shelf = show(posttrain.open_desk(tokenizer), after=learned)
    shelf
    return learned, shelf


@app.cell(hide_code=True)
def _(learned, posttrain, predict):
    predict(
        learned,
        ["a tenth", "about half", "nearly all"],
        posttrain.guess_share("chitchat"),
        why="Measured on the first chats of the set, special tokens included.",
    )
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 2. Train on your mixture

    The mixture from above goes into the settings (in Jupyter, run their cell again). **Bits per byte** say
    how surprised the model is by new text: lower is better. Two numbers are watched. One is on the
    assistant's words of talks that were held back: the **gain**. The other is on the kind of text that the
    base model came from: what it **forgets**.
    """)
    return


@app.cell
def _(FinetuneConfig, EvalConfig, RuntimeConfig, settings, shelf):
    start = FinetuneConfig(
        tag="my-mix",
        base="shipped/base",
        dialogues=shelf.mixture,
        steps=20,
        batch_tokens=2048,
        runtime=RuntimeConfig(compile="off"),
        eval=EvalConfig(snapshots=False),
    )
    form = settings(start, ("tag", "dialogues", "steps"), title="Settings")
    form
    return (form,)


@app.cell
def _(finetune, form, stage):
    run = stage(finetune, form.config, title="Fine-tune on the mixture")
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
            posttrain.list_curves(run.result),
            "step",
            "bits per byte (lower is better)",
            title="What it gains, and what it forgets meanwhile",
        )
    )
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 3. Before and after

    The same words to both models, with the same random draws. The base model does not answer: it goes on
    with your words, sometimes in the middle of one. A model of this size has read a few million words: look
    at the manner, not at what it knows.
    """)
    return


@app.cell(hide_code=True)
def _(posttrain, run, show):
    show(posttrain.open_answers("shipped/base", run.result))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 4. Choose your mix

    One set at a time, every run with as many steps and tokens, several **seeds** (a seed decides the order of
    the talks; a difference smaller than that between two seeds says nothing). `gain` is measured on each
    set's own held-back talks, so that it tells how well a set can be learned; `common gain` on the same talks
    for all, some of every set, so that its rows can be compared. `forgotten` is on the same general text for
    all: these three are changes in bits per byte since before the run. `distinct-2` is on the answers to six
    questions: the share of their pairs of words that are different ones.
    """)
    return


@app.cell(hide_code=True)
def _(posttrain, settings):
    plan = settings(posttrain.SeriesConfig(), ("names", "seeds", "steps"), title="What to compare")
    plan
    return (plan,)


@app.cell(hide_code=True)
def _(plan, posttrain, stage):
    series = stage(posttrain.compare_sets, plan.config, title="One set at a time")
    series
    return (series,)


@app.cell(hide_code=True)
def _(posttrain, series, show):
    show(
        posttrain.open_table(
            series.result, ("gain", "common gain", "forgotten", "distinct-2", "seconds")
        )
    )
    return


@app.cell(hide_code=True)
def _(draw_tradeoff, posttrain, series, show):
    show(
        draw_tradeoff(
            posttrain.name_axes(series.result),
            "gain on the common talks, bits per byte",
            "forgotten of general text, bits per byte",
            title="Right is better, low is better; a dot is a seed",
        )
    )
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    When you have chosen, set the weights at the top: **the line under the shelf is the setting that the stage
    reads**, here, on the command line (`primechat finetune --dialogues "..."`) and in a run's `config.json`.

    ## 5. Exercises

    In the editor, replace the `...` in each cell and run it: the card says which rule does not hold yet.
    """)
    return


@app.cell
def _(EXERCISES, exercise):
    def mark_learned(parts): ...

    exercise(EXERCISES[0], mark_learned)
    return


@app.cell
def _(EXERCISES, exercise):
    def order_turns(talk): ...

    exercise(EXERCISES[1], order_turns)
    return


if __name__ == "__main__":
    app.run()
