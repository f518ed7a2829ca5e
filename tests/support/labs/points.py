import marimo

app = marimo.App(width="medium")


@app.cell
def _():
    import numpy as np

    from primechat.events import Channel
    from primechat.interp.embeddings.atlas import Atlas
    from primechat.labkit import lab
    from primechat.views.widgets.atlas import AtlasView

    class Big(Atlas):
        def load(self, space):
            return np.random.default_rng(0).normal(size=(2, 65536, 8)).astype("float32")

        def describe(self, space):
            kinds = Channel(
                key="kind", title="kind", values=np.arange(65536) % 6, names=tuple("abcdef")
            )
            return tuple(f"token{i}" for i in range(65536)), ("0", "1"), (kinds,)

    lab.show(AtlasView(Big({"all": "many points"}), picked=17))
    return


if __name__ == "__main__":
    app.run()
