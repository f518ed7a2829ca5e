import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Embedding atlas")


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    # Do related words sit together, and when does the map lie?

    A language model cuts text into **tokens**, short pieces of text, often a word or a part of one. It
    cannot compute with letters, so it keeps a row of numbers for each token: its **embedding**, also called
    its **vector**. Training moves these rows until they are of use, and tokens that are used alike end up
    near each other. Nobody tells the model which words are related; it has only read text.

    A row is a point in a space of some hundred directions, and a screen has two. Every map of such a space
    leaves something out. Here you look at the points of a real model, and you measure what the map hides.
    """)
    return


@app.cell(hide_code=True)
def _():
    import marimo as mo

    return (mo,)


@app.cell(hide_code=True)
def _():
    from primechat.exercises.embedding_atlas import EXERCISES
    from primechat.labkit.lab import exercise, offer_model, predict, show

    return EXERCISES, exercise, offer_model, predict, show


@app.cell(hide_code=True)
def _(offer_model):
    choice = offer_model("shipped/base")
    choice
    return (choice,)


@app.cell(hide_code=True)
def _(choice):
    from primechat.labkit.instruments.explorer import TRENDS, Explorer

    explorer = Explorer(choice)
    choice.end()
    return TRENDS, explorer


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 1. Guess, then look

    Two tokens are **neighbours in the true space** if their rows point nearly the same way; the **cosine**
    says how nearly, 1 for the same direction and 0 for a right angle. They are **neighbours on the map** if
    they are drawn close together. The map below is made by **PCA**, which draws the points along the two
    directions in which they differ most.
    """)
    return


@app.cell(hide_code=True)
def _(explorer, predict):
    kept = "Of a token's ten true neighbours, how many are among the ten nearest to it on the map?"
    predict(
        kept,
        (0, 10),
        lambda: round(explorer.kept, 1),
        within=0.5,
        unit="of 10",
        why="That is the mean over tokens, of the map below. What looks close is seldom close; what is close "
        "is often drawn far away. The line under the map says so for every map that you make.",
    )
    return (kept,)


@app.cell(hide_code=True)
def _(explorer, kept, show):
    atlas = show(explorer.view, after=kept)
    atlas
    return (atlas,)


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    Click a token, or find one by name. The lines lead to its true neighbours, the rings are those that the
    picture puts beside it. A dot (·) stands for the space before a word.

    **UMAP** is another kind of map: it bends the space so that neighbours stay together, and gives up
    everything else. It takes half a minute or more, in the background. Compare the number under the map.

    Hold Shift and draw around some points: they appear in a table, and in Python as a data frame.
    """)
    return


@app.cell
def _(atlas):
    import pandas as pd

    # what you have selected on the map, one row a token (in Jupyter, run this cell again)
    frame = pd.DataFrame(atlas.selected())
    frame if len(frame) else print("Nothing is selected yet: hold Shift and draw on the map.")
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 2. When the map lies

    The same count for each kind of map, beside two controls in grey: points dropped at random on the map,
    and PCA of plain random numbers. If a map keeps no more neighbours than these, its closeness means
    nothing.
    """)
    return


@app.cell(hide_code=True)
def _(explorer, kept, show):
    show(explorer.compare_maps(), after=kept)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 3. Related words

    If “talk” is to “talking” as “try” is to “trying”, the step from the first to the second word may be the
    same in both. Then **c + b − a** leads near the answer. Often it seems to work for a poor reason: the
    answer is simply the nearest neighbour of c, and the step adds nothing. So the middle column leaves the
    step out, and the last one, the control, takes a step that has nothing to do with it.
    """)
    return


@app.cell(hide_code=True)
def _(explorer, show):
    show(explorer.ask_analogy())
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    One example proves little. Here every pair of the vocabulary that a rule of spelling joins is asked.
    """)
    return


@app.cell(hide_code=True)
def _(explorer, show):
    show(explorer.score_rules())
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 4. The time machine

    The run below was saved while it trained. At step 0 all rows are random numbers. All moments are drawn on
    the axes of the last one, so whatever moves on the map has moved in the model.
    """)
    return


@app.cell(hide_code=True)
def _(explorer, show):
    journey, course = explorer.travel()
    show(journey)
    return (course,)


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    Do related tokens find each other? The blue line is the mean cosine of pairs that differ by a rule of
    spelling. The grey one is the same with the second words shuffled: the control.
    """)
    return


@app.cell(hide_code=True)
def _(course, show):
    show(course)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## Try it

    Three short functions: the two that made the numbers above, and the one that keeps the time machine
    honest. In the editor, replace the `...` and run the cell.
    """)
    return


@app.cell
def _(EXERCISES, exercise):
    import numpy as np

    def nearest(table, row, k): ...

    exercise(EXERCISES[0], nearest)
    return (np,)


@app.cell
def _(EXERCISES, exercise):
    def overlap(true, drawn): ...

    exercise(EXERCISES[1], overlap)
    return


@app.cell
def _(EXERCISES, exercise):
    def place_all(tables): ...

    exercise(EXERCISES[2], place_all)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## More: long and short rows

    A row has a direction and a length. Guess before you look.
    """)
    return


@app.cell(hide_code=True)
def _(TRENDS, explorer, predict):
    longer = "Whose rows are longer in the table of input embeddings?"
    predict(longer, TRENDS, lambda: explorer.find_trend("input"), why="{}")
    return (longer,)


@app.cell(hide_code=True)
def _(explorer, longer, show):
    show(explorer.draw_lengths(), after=longer)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    A token that the training text never held is never looked up, so nothing pushes its input row: it stays as
    long as it began (with weight decay it would shrink), while the rows in use have grown. The model scales
    every input row to one length before it uses it, so these lengths are traces of training, not of meaning.

    The **output embeddings** are another table; choose it above. There every row is pushed at every place of
    the text: the row of the token that comes towards the model's state, all others away from it. A token
    that never comes is only ever pushed away. So its row becomes one of the longest, and its token one of the
    quietest: a long row is no loud voice, it matters where it points. The line under the figure says how
    long these rows are, and whether the tokens of long rows score high or low.

    ## More: do all rows lean one way?

    If the rows were spread evenly, two of them would be at right angles on the average: mean cosine 0.
    Where the mean is far from 0, all rows share a direction, and high cosines mean less. The second figure
    counts the directions that carry the differences; the fewer there are, the better a flat map can be.
    """)
    return


@app.cell(hide_code=True)
def _(explorer, show):
    show(explorer.draw_evenness())
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## More: a word in its text

    An embedding is the same wherever a token stands. On its way through the layers it takes in what stands
    before it. Move the slider: tokens that are the same begin in one place, and part as the layers pass.
    Write another text; the same word in two meanings is worth a try.
    """)
    return


@app.cell(hide_code=True)
def _(explorer, show):
    show(explorer.read_text())
    return


if __name__ == "__main__":
    app.run()
