import marimo

__generated_with = "0.25.2"
app = marimo.App(width="full", app_title="Chat")


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    # Can I use a small ChatGPT of my own every day?

    Pick a model and write. Under each reply stand its speed, the time to its first **token** (a short piece
    of a word) and its length. Click **Tokens** to see what else it could have said, and go on from there.
    **+ Compare** asks up to four models the same.
    """)
    return


@app.cell(hide_code=True)
def _():
    import marimo as mo

    from primechat.chat.session import open_chat
    from primechat.exercises.chat import EXERCISES, RankStudy
    from primechat.labkit.lab import borrow_model, exercise, predict, show
    from primechat.views.conversations import draw_ranks

    return EXERCISES, RankStudy, borrow_model, draw_ranks, exercise, mo, open_chat, predict, show


@app.cell(hide_code=True)
def _(open_chat, show):
    show(open_chat(height="min(76vh, 900px)"))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    Everything stays on this machine: no text leaves it, and what a model writes can only ever be text, never
    code that runs. `primechat lab 10 --app` shows this page as an app; people who open it at the same
    time do not see each other's chats. In a terminal, `primechat chat` talks to the same models.

    ## What the figures say

    - **tokens/s**: how fast it writes. The first token is not counted.
    - **first token**: how long you waited before anything appeared. The model first reads the whole
      conversation, so this grows with its length.
    - **tokens**: how many were written; under *more* also how many were read. A model is trained on texts
      of a certain length, its **context**; *more* tells how much of it is used. Beyond it, replies get
      worse.
    - **entropy** (under *more*): how open the choice was, on average. If it says *as if it chose among 8
      equally likely tokens*, a throw of an eight-sided die decided each.

    A `~` stands before figures that still change.

    ## How is the next word chosen?

    A model gives **every** token a probability. Then one is drawn: the **temperature** says how strictly the
    likely ones are preferred (0: only ever the likeliest), **top-k** and **top-p** cut off the unlikely ones.
    A **repetition penalty** above 1 makes every token that already stands there less likely, also the useful
    ones. Some models come with their makers' advice on all this; it is followed until you choose otherwise,
    and *Settings* says so.
    """)
    return


@app.cell(hide_code=True)
def _(RankStudy, borrow_model, predict):
    ranks = RankStudy(borrow_model)
    likeliest = "At temperature 0.8, how many of a hundred tokens are the one that the model held likeliest?"
    predict(
        likeliest,
        (0, 100),
        lambda: round(100 * ranks.shares["this model"]["1st"]),
        why="Measured just now on three short replies of the default model. The rest is chance, and that is "
        "why two seeds give two replies.",
        within=8,
        unit="tokens",
    )
    return likeliest, ranks


@app.cell(hide_code=True)
def _(draw_ranks, likeliest, ranks, show):
    show(lambda: draw_ranks(ranks.shares), after=likeliest)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    Grey is a model of the same shape with random weights: it holds no token likelier than another, so what
    it takes is spread over all that top-k leaves. A few dozen tokens are few; another seed moves each bar by
    some per cent. And a small model's first choice is not a d20's: it is sure of less, and more often wrong.
    """)
    return


@app.cell(hide_code=True)
def _(predict):
    predict(
        "You ask the same twice, with the same seed and settings, temperature 0.8. Are the replies the same?",
        ("The same, to the letter", "Similar", "Different"),
        "The same, to the letter",
        why="The seed fixes the numbers that decide each draw. Try it above: New chat, the same words.",
    )
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## Try it yourself

    Three small functions that every chat needs. Write yours in place of the `...`.
    """)
    return


@app.cell
def _(EXERCISES, exercise):
    def draw(p, u): ...

    exercise(EXERCISES[0], draw)
    return


@app.cell
def _(EXERCISES, exercise):
    def keep(p, top_p): ...

    exercise(EXERCISES[1], keep)
    return


@app.cell
def _(EXERCISES, exercise):
    def stream(pieces): ...

    exercise(EXERCISES[2], stream)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## Keep what you like

    *Settings → Save* writes the conversations of this page as JSON lines, and `primechat finetune --dialogues
    FILE` reads them: answers that you edited and liked can teach the next model. It needs two conversations
    at least, one of them to measure on. *Load* brings them back.

    ## Keys

    Enter sends, Shift+Enter starts a new line, Esc stops, ↑ in the empty line edits your last message, Alt+N
    begins a new chat, Alt+R answers anew, Alt+C copies the last reply, Alt+T shows tokens, Alt+← and Alt+→
    turn between answers.
    """)
    return


if __name__ == "__main__":
    app.run()
