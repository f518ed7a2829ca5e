import marimo

app = marimo.App()


@app.cell
def _():
    from primechat.labkit.lab import predict, show
    from primechat.views.widgets.strips import TalkStrips

    def turn(text, a, b):
        return {"who": "x", "text": text, "values": [a, b], "tokens": [[text, 1.0, 0.5, 0]]}

    rows = [{"name": n, "about": n, "full": 1.0} for n in ("one", "two")]
    turns = [turn("first", None, 0.5), turn("second", 1, 2), turn("<b>third</b>", 0, 0)]
    talks = [{"title": "t", "loop": 1, "turns": turns}]
    groups = [{"name": "main", "about": "", "talks": talks}]
    alone = [{"title": "o", "loop": -1, "turns": [turn("alone", 1, 1)]}]
    groups.append({"name": "other", "about": "", "talks": alone})
    show(TalkStrips(rows, groups), after="Which?")
    return (predict,)


@app.cell
def _(predict):
    predict("Which?", ("left", "right"), "left")
    return


if __name__ == "__main__":
    app.run()
