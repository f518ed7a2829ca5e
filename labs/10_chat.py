import marimo

app = marimo.App(width="full", app_title="10 Chat")


@app.cell(hide_code=True)
def _():
    import marimo as mo

    return (mo,)


@app.cell(hide_code=True)
def _(mo):
    mo.md("""
    # 10 · Can I live with my own small ChatGPT?
    """)
    return


@app.cell
def _():
    from primechat.desk.session import open_chat
    from primechat.lab import show

    show(open_chat())
    return


if __name__ == "__main__":
    app.run()
