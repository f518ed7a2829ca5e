import marimo

app = marimo.App(width="full")


@app.cell
def _():
    from chat_pages import open_page

    from primechat.labkit.lab import show

    show(open_page())
    return


if __name__ == "__main__":
    app.run()
