import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Plan a run")


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    # What does a model cost before I pay for it?

    Training is arithmetic on text. How much arithmetic, how much memory and how much disk can be worked out
    beforehand, from a handful of numbers. Then a rented machine holds no surprise. Here you turn the dials;
    the counts are exact, hours and dollars are estimates that say what they rest on.
    """)
    return


@app.cell(hide_code=True)
def _():
    import marimo as mo

    from primechat.exercises.plan_a_run import EXERCISES
    from primechat.labkit.instruments import budget, forecasts
    from primechat.labkit.lab import Live, exercise, in_notebook, predict, settings, show, stage

    return (
        EXERCISES,
        Live,
        budget,
        exercise,
        forecasts,
        in_notebook,
        mo,
        predict,
        settings,
        show,
        stage,
    )


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 1. A guess first

    The **depth** of a model is its number of blocks, and its width grows with it: nanochat's d20 has 20
    blocks, d32 has 32. In the recipe of October 2025 each is trained on 20 tokens for every **parameter**,
    that is for every number that it learns.
    """)
    return


@app.cell(hide_code=True)
def _(budget, predict):
    _times = budget.price_ratio()
    predict(
        "The d20 costs about $85 on 8 H200. What does the d32 cost, as a multiple of that?",
        ["1.6 times", "3.4 times", "12 times", "100 times"],
        "12 times",
        why=f"It is {_times:.1f} times: 3.35 times the parameters, each of which needs its 20 tokens, so "
        "3.35 times the tokens too. The work is their product, 11.2, and a little more: the table in which "
        "tokens are looked up costs no sums, and it is a smaller share of the large model.",
    )
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 2. Turn the dials

    The bars show what fills one GPU and the disk; the upright line is what there is. **Shards** are the
    files of text, 100 MB each; removing those that have been read keeps a long run on a small disk.
    """)
    return


@app.cell(hide_code=True)
def _(Live, budget, show):
    show(
        Live(
            budget.describe_run,
            labels={"evict": "remove shards that have been read"},
            depth=(4, 40, 20),
            machine=budget.MACHINES,
            tokens_per_parameter=(5, 60, 20),
            evict=False,
        )
    )
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    The same run on other machines. **MFU**, the share of its peak that a machine reaches in training, comes
    from runs that others and we have timed; where it is a guess, the table says so. The runs were not the
    same, so a few points of MFU between two rows may be the runs' and not the machines'.
    """)
    return


@app.cell(hide_code=True)
def _(Live, budget, show):
    show(Live(budget.compare_machines, depth=(4, 40, 20)))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 3. What fills a GPU?

    Each parameter is there as a **weight**, as a **gradient** (which way to move it) and in the
    **optimizer** (how it moved lately; 8 GPUs share that). **Activations** are what every block keeps of
    the text until the gradients have been computed; they grow with the rows that are read at a time. The
    slider counts powers of two. Recomputing keeps only each block's input, and computes the inside again:
    memory for time. **Logits** are the scores of all tokens that could come next. Here the model has 32
    blocks and the GPU 80 GB: there it becomes tight.
    """)
    return


@app.cell(hide_code=True)
def _(Live, budget, show):
    show(
        Live(
            budget.draw_rows,
            labels={"rows": "rows, as a power of two", "recompute": "recompute blocks"},
            depth=(12, 40, 32),
            rows=(0, 6, 4),
            recompute=False,
        )
    )
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 4. How good will it be?

    Nobody pays for a large run on a hope. One trains small models first, lays a curve through what they
    reached, and reads off where the large one will land. They are measured in **bits per byte**: how many
    yes-or-no questions a model needs for each byte of a text that it has not seen. It falls as the model
    grows and as it reads more, and each step down costs more than the one before.

    Below, models of one to three blocks have read up to two million tokens each. The model that ships with
    primechat is larger and has read eight times as much; the curve has never seen it.
    """)
    return


@app.cell(hide_code=True)
def _(forecasts, predict):
    _best = min(run.bpb for run in forecasts.read_record()[0].runs)
    _came = forecasts.open_outcome()
    shipped = f"The best of the small models needs {_best:.2f} bits per byte. What does the shipped one need?"
    predict(
        shipped,
        (1.0, 2.0),
        _came.bpb if _came else _best,
        within=0.06,
        why="See what the forecast from the small runs was, and whether it held.",
    )
    return (shipped,)


@app.cell(hide_code=True)
def _(Live, forecasts, shipped, show):
    show(Live(forecasts.show_record), after=shipped)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    The dots are runs, the lines are the curve: **E + A / N^a + B / D^b**, with N the parameters and D the
    tokens. E is what neither removes. Many curves fit the dots nearly as well; the band holds where 90 of
    100 of them put the larger model, so it is wide far away from the dots. A diamond is what came.
    Hoffmann and others found this form in 2022.

    Do it yourself: nine small models and a larger one that is held out. It takes about three minutes on a
    laptop, and Stop keeps what is done. So short a training makes a rougher curve than the one above.
    """)
    return


@app.cell(hide_code=True)
def _(forecasts, in_notebook, settings):
    series = (
        settings(
            forecasts.SmallRunsConfig(), ("depths", "tokens", "held_out"), title="The small runs"
        )
        if in_notebook()
        else None
    )
    series
    return (series,)


@app.cell(hide_code=True)
def _(forecasts, series, stage):
    runs = (
        stage(forecasts.train_small, series.config, title="Train them")
        if series is not None
        else None
    )
    runs
    return (runs,)


@app.cell(hide_code=True)
def _(Live, forecasts, runs, show):
    show(
        Live(lambda: forecasts.show_forecast(runs.result, runs.state))
    ) if runs is not None else None
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 5. Work it out yourself

    On the command line the same is `primechat plan --depth 20 --gpus 8xH200`.
    """)
    return


@app.cell
def _(EXERCISES, exercise):
    def count_params(vocab_size, n_layer, n_embd): ...

    exercise(EXERCISES[0], count_params)
    return


@app.cell
def _(EXERCISES, exercise):
    def train_hours(flops, n_gpus, peak_flops, mfu): ...

    exercise(EXERCISES[1], train_hours)
    return


if __name__ == "__main__":
    app.run()
