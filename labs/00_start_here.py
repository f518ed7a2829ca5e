import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Start here")


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    # Does a ChatGPT of my own run on this machine?

    Yes: here it is. It is small, and a part of primechat, so nothing needs to be downloaded, and what you
    write stays on this machine. Ask how its day was; ask about food, music or a pet.
    """)
    return


@app.cell(hide_code=True)
def _():
    import marimo as mo

    return (mo,)


@app.cell(hide_code=True)
def _():
    from primechat.chat.session import open_chat
    from primechat.exercises.start_here import EXERCISES
    from primechat.labkit.lab import exercise, predict, show

    return EXERCISES, exercise, open_chat, predict, show


@app.cell(hide_code=True)
def _(open_chat, show):
    show(open_chat("shipped/sft", height="460px"))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    It has read small talk and little else, so it chats, and it makes things up: it does not know who was
    president, or what you said an hour ago. **Stop** ends a reply at once, and **Tokens** shows what else it
    could have said.

    ## 1. What did you talk to? (one minute)

    A **language model** is a list of numbers, its **parameters**, and a rule that turns a text into a guess
    at what comes next. It reads and writes **tokens**, short pieces of words. Its numbers come from reading.
    How much? Guess first:
    """)
    return


@app.cell(hide_code=True)
def _():
    from primechat.labkit.instruments.firststeps import (
        READING,
        measure_reading,
        open_check,
        open_download,
        open_machine,
    )

    return READING, measure_reading, open_check, open_download, open_machine


@app.cell(hide_code=True)
def _(READING, measure_reading, predict):
    predict(
        "At 250 words a minute: how long would you read what the model that ships was trained on?",
        READING,
        measure_reading,
        why="{} Today's largest models have read trillions of words: tens of thousands of years. Small "
        "is enough to see how everything works, and too small to know anything about the world.",
    )
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 2. Is it sound? (one minute)

    A file of numbers looks the same whether it has learned something or not. So let the model read a page of
    plain English and measure its surprise in **bits per byte**: how many yes-or-no answers it would need, on
    average, to be told the next byte. Beside it stand three readers that know nothing: the same model with
    the ids of its tokens shuffled, a model with random weights, and one that holds all tokens equally likely.
    """)
    return


@app.cell(hide_code=True)
def _(open_check, show):
    show(open_check())
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 3. What else is here (one minute)

    A name such as `shipped/sft` or `base/d4` says where a model comes from: **base** models go on with any
    text, **sft** models were then taught to answer.
    """)
    return


@app.cell(hide_code=True)
def _(open_machine, show):
    show(open_machine())
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 4. Bring in a larger one, if you like

    These come from the Hugging Face Hub, a public library of models. **Show its size** only asks; nothing is
    moved before you press **Download**. On a laptop the smallest of them writes a few tokens a second.
    """)
    return


@app.cell(hide_code=True)
def _(open_download, show):
    show(open_download())
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 5. Two exercises

    Replace the `...` in a cell and run it (Shift+Enter); the card says what does not hold yet.
    """)
    return


@app.cell
def _(EXERCISES, exercise):
    def weigh_model(n_params, dtype): ...

    exercise(EXERCISES[0], weigh_model)
    return


@app.cell
def _(EXERCISES, exercise):
    def measure_bits(nats, n_bytes): ...

    exercise(EXERCISES[1], measure_bits)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## Where to go next

    - **01 Tokenizer playground**: why did my word become these tokens?
    - **02 Attention internals**: what does a part of the model read, and what breaks without it?
    - **03 Embedding atlas**: which words does it hold to be related?
    - **05 Pretraining**: noise becomes words, on this machine, in minutes.
    - **10 Chat**: the page at the top, larger.

    `primechat lab --list` names them all; `primechat quickstart` makes a model of your own, from nothing.
    """)
    return


if __name__ == "__main__":
    app.run()
