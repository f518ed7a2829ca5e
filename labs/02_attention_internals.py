import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Attention internals")


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    # What does a head read, and what breaks without it?

    A language model cuts text into **tokens**, short pieces of text, often a word or a part of one. It
    guesses the next token from those before. Before it guesses, every token may look back at the others:
    the parts that look are called **heads**. A model has several heads in each of its **layers**, the steps
    that a text passes one after the other; a layer is also called a **block**.

    Here you watch the heads of a real model at work on your own text, switch some off, and see what the
    model can no longer do. Every number on this page comes from the model's own **forward
    pass**, one run of the text through all its layers.
    """)
    return


@app.cell(hide_code=True)
def _():
    import marimo as mo

    return (mo,)


@app.cell(hide_code=True)
def _():
    from primechat.exercises.attention_internals import EXERCISES
    from primechat.labkit.lab import exercise, offer_model, predict, show

    return EXERCISES, exercise, offer_model, predict, show


@app.cell(hide_code=True)
def _(offer_model):
    choice = offer_model("shipped/base")
    choice
    return (choice,)


@app.cell(hide_code=True)
def _(choice):
    from primechat.labkit.instruments import survey
    from primechat.labkit.instruments.microscope import Microscope

    scope = Microscope(choice)
    choice.end()
    return scope, survey


@app.cell(hide_code=True)
def _(scope, show):
    show(scope.prompt)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 1. Look

    For each token, a head divides its attention among that token and all before it; the shares add up to
    100 %. Guess first, then look.
    """)
    return


@app.cell(hide_code=True)
def _(predict, scope, survey):
    predict(
        "If a token read all that it sees alike, most of its attention would fall in between, as most tokens "
        "are there. What does it read most beyond its fair share, all heads together?",
        survey.PLACES,
        lambda: survey.find_favourite(scope.scene, scope.passages),
        why="Measured over 30 held-out passages, with the 95 % interval of the mean, and in brackets what "
        "reading all alike would give: {}. "
        "In larger models many heads that have nothing to look for rest on the first token; do some here?",
    )
    return


@app.cell(hide_code=True)
def _(scope, show):
    show(scope.look())
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    Tick **random numbers in the blocks** to see the same heads without training: the pattern that stays is
    the architecture's, the one that goes is what the model has learned.

    ## 2. Switch off

    Seeing where a head looks does not tell whether it matters. So take it out: its output becomes zero, and
    the rest of the model has to do without. The **loss** says how surprised the model is by the token that
    really comes, in nats (a nat is about 1.44 bits); an **MLP** is the part of a layer that works on each
    token by itself.
    """)
    return


@app.cell(hide_code=True)
def _(predict, scope, survey):
    predict(
        "One single head goes off, the one that your text needs most. By how many nats does the loss grow on "
        "30 other texts?",
        survey.EFFECTS,
        lambda: survey.find_worst(scope.scene, scope.passages, search=scope.is_small),
        why="{} What a head shows when you look is not yet what it is worth; nor is what one text says.",
    )
    return


@app.cell(hide_code=True)
def _(scope, show):
    show(scope.ablate())
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    Now choose **its words shuffled, twice**. Shuffled words make no sense, so the first half is hard; the
    second half is the first once more, and easier for a model that looks back and copies. Part of that has
    nothing to do with copying: it has seen which words occur. The control is the second half in other
    orders, where nothing can be copied; only what the same order saves beyond it is copying. Find the
    switches that stop it; **Try each one alone** does it for you. A small model that has read little may
    not have learned to copy: then the order makes no difference, and that is a finding too. A model that has
    is one pick away: `hf:smollm2`, if it is installed.

    ## 3. Lens

    What a token carries from layer to layer is one list of numbers, the **stream**; each layer adds to it.
    The lens reads the stream after every layer as if the model ended there. The whole model may still differ
    from its last layer: the shipped one ends by taking off a part of what the stream held halfway.
    """)
    return


@app.cell(hide_code=True)
def _(predict, scope, survey):
    predict(
        "After which stage is the first guess already the final one, for at least half of the tokens?",
        survey.STAGES,
        lambda: survey.find_settling(scope.scene, scope.passages),
        why="Agreement with the final first guess, means over 30 held-out passages: {}.",
    )
    return


@app.cell(hide_code=True)
def _(scope, show):
    show(scope.lens())
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 4. More

    Each part below opens with a click. The **time machine** has snapshots, copies of a small model kept while
    it trained: pull the slider from noise to words. A **logit** is the score of a token before scores become
    probabilities; a **softcap** bends large ones down, so that none runs away. Each head makes of each token
    a **query**, what it looks for, and a **key**, what it offers: where the two fit, it reads.
    """)
    return


@app.cell(hide_code=True)
def _(scope, show):
    show(scope.time_machine())
    return


@app.cell(hide_code=True)
def _(scope, show):
    show(scope.scores())
    return


@app.cell(hide_code=True)
def _(scope, show):
    show(scope.shares())
    return


@app.cell(hide_code=True)
def _(scope, show):
    show(scope.neurons())
    return


@app.cell(hide_code=True)
def _(scope, show):
    show(scope.patching())
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
    def weigh_tokens(queries, keys, scale): ...

    exercise(EXERCISES[0], weigh_tokens)
    return


@app.cell
def _(EXERCISES, exercise):
    def score_copying(weights, ids): ...

    exercise(EXERCISES[1], score_copying)
    return


@app.cell
def _(EXERCISES, exercise):
    def split_logit(written, row): ...

    exercise(EXERCISES[2], split_logit)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## In your own code

    `capture` keeps what passes any named point of a forward pass, as numpy arrays; `ablate=` switches parts
    off. Parts and layers count from 0.
    """)
    return


@app.cell
def _():
    from primechat import capture, open_model

    model, tokenizer, _ = open_model("shipped/base")
    ids = [tokenizer.bos_id, *tokenizer.encode("The cat sat on the mat because the cat")]
    seen = capture(model, ids, points=["layer.*.attn.weights", "layer.0.resid"])
    cut = capture(model, ids, ablate=["layer.1.head.0"])
    print("weights (layers, heads, T, T):", seen.stack("attn.weights").shape)
    print(f"loss {seen.losses.mean():.3f}, without layer 1, head 0: {cut.losses.mean():.3f} nats")
    return


if __name__ == "__main__":
    app.run()
