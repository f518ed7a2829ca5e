import marimo

app = marimo.App()


@app.cell
def _():
    import plotly.graph_objects as go

    from primechat.labkit.lab import predict, show

    def find():
        print("COMPUTED")
        return 37

    def draw():
        print("COMPUTED")
        return go.Figure(go.Scatter(y=[3, 1, 2]), layout_title_text="a function")

    return draw, find, go, predict, show


@app.cell
def _(find, predict):
    predict("How much?", (0, 100), find, why="Because.")
    return


@app.cell
def _(go, show):
    show(go.Figure(go.Bar(y=[1, 2, 3]), layout_title_text="a figure"), after="How much?")
    return


@app.cell
def _(draw, show):
    show(draw, after="How much?")
    return


if __name__ == "__main__":
    app.run()
