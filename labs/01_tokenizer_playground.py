import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Tokenizer playground")


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    # Why did my word become these tokens?

    A language model does not read letters. Before it sees a text, a **tokenizer** cuts it into **tokens**:
    short pieces, each with a number, its **id**. A common word is one token; a rare one is several; an
    emoji may be a dozen. What the model can count, spell and afford begins here.

    Type into the box. Every colour is one token. Point at one, or move the caret into it, and its text, its
    id and its bytes light up together. A dot stands for the space before a word, ↵ for the end of a line.
    The **context** is how many tokens a model can read at once.
    """)
    return


@app.cell(hide_code=True)
def _():
    import marimo as mo

    return (mo,)


@app.cell(hide_code=True)
def _():
    from primechat.exercises.tokenizer_playground import EXERCISES
    from primechat.labkit.instruments.tokenizers import Tokenizers
    from primechat.labkit.lab import exercise, predict, show

    return EXERCISES, Tokenizers, exercise, predict, show


@app.cell(hide_code=True)
def _(Tokenizers):
    tokenizers = Tokenizers()
    return (tokenizers,)


@app.cell(hide_code=True)
def _(show, tokenizers):
    show(tokenizers.playground())
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    Text is stored as **bytes**, numbers from 0 to 255: an English letter is one byte, é is two, an emoji
    four or more. The tokenizer works on the bytes, so no text is ever unknown to it; press **Bytes** to see
    them. Press **Compare** to cut the same text with another model's tokenizer: a red bar marks each border
    on which they disagree.

    ## 1. Why these pieces?

    The tokenizer knows an ordered list of **merges**: pairs of pieces that become one. The place of a merge
    in the list is its **rank**; 0 to 255 are the bytes, so the first merge has rank 256. To cut a word, it
    starts from the bytes and makes, again and again, the known merge of the lowest rank. Guess first.
    """)
    return


@app.cell(hide_code=True)
def _(predict, tokenizers):
    _options, _answer = tokenizers.guess_count(" unbelievably")
    predict(
        "How many tokens is “ unbelievably”, with the space before it, for the first tokenizer above?",
        _options,
        _answer,
        why="It has 13 bytes with its space. Each merge makes one part of two, and it ends when no pair that "
        "is left is a known merge. Type it below and play it.",
    )
    return


@app.cell(hide_code=True)
def _(show, tokenizers):
    show(tokenizers.replay())
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    The grey lines are walls: before any merge, a fixed pattern cuts the text into words, numbers and
    punctuation, and no merge crosses a wall. The space belongs to the word that follows it.

    ## 2. Where do the merges come from?

    From counting. Training takes a text, counts which two pieces stand side by side most often, makes them
    one new token, and counts again, until the vocabulary has the size that was asked for. This is
    **byte-pair encoding**, BPE for short. Press **Learn** and watch; then try a text of your own.
    """)
    return


@app.cell(hide_code=True)
def _(show, tokenizers):
    show(tokenizers.trainer())
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 3. Who pays more?

    A tokenizer is frugal with text like the one it was trained on. The same story in another language may
    cost several times as many tokens: more time, more money, less room in the context. How much is it the
    words, and how much the letters? Shuffle the letters of the English text: the alphabet is the same, the
    words are gone.
    """)
    return


@app.cell(hide_code=True)
def _(predict, tokenizers):
    shuffled = "English with its letters in random order: how many times as many tokens as before?"
    predict(
        shuffled,
        (0.5, 4),
        round(tokenizers.shuffled_ratio(), 2),
        within=0.3,
        unit="times",
        why="Merges are frequent neighbours. Random letters have few of them, so most stay alone: what a "
        "tokenizer saves, it saves by knowing words.",
    )
    return (shuffled,)


@app.cell(hide_code=True)
def _(show, shuffled, tokenizers):
    show(tokenizers.fertility(), after=shuffled)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    The bars have the colours of the tokenizers above them. Click a row to see it cut. The shuffled row is the
    control: it has no words, in any language.

    ## 4. How does a chat become one text?

    A model continues a text; it knows no messages. So a conversation is written as one row of tokens, and
    **special tokens**, which no typed text can produce, stand for “here the user begins” or “here the
    answer ends”. In training only some of them are **learned**, that is, the model is corrected when it
    fails to predict them. This **loss mask** is lit in green.
    """)
    return


@app.cell(hide_code=True)
def _(show, tokenizers):
    show(tokenizers.chat())
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 5. What is in a vocabulary?

    Search all tokens; the first 256 are the bytes, in `< >` those that are no character. Some tokens are in
    the list but stand nowhere in the training text; a model that meets one of them knows nothing about it.
    """)
    return


@app.cell(hide_code=True)
def _(show, tokenizers):
    show(tokenizers.vocabulary())
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## Try it yourself

    In the editor, replace the `...` and run the cell: the check names the first rule that does not hold.
    """)
    return


@app.cell
def _(EXERCISES, exercise):
    def cut_word(word, ranks): ...

    exercise(EXERCISES[0], cut_word)
    return


@app.cell
def _(EXERCISES, exercise):
    def count_pairs(words): ...

    exercise(EXERCISES[1], count_pairs)
    return


@app.cell
def _(EXERCISES, exercise):
    def light_mask(tokens): ...

    exercise(EXERCISES[2], light_mask)
    return


if __name__ == "__main__":
    app.run()
