import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Autochat entropy")


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    # A model talks to itself: where does it begin to go round in circles?

    Let a model answer its own answers, again and again. People can talk for hours; small models come to a
    loop, a silence, or the same few words. Here you watch it happen, turn by turn, measure it, and try what
    helps.

    A model cuts text into **tokens**, short pieces of words. Before each token it gives every possible one a
    probability. **Entropy** says how open that choice was, in nats: 0 means sure, 3 means about as open as
    among twenty equally likely tokens (e³ ≈ 20).
    """)
    return


@app.cell(hide_code=True)
def _():
    import marimo as mo

    from primechat.config import AutochatConfig
    from primechat.lab import borrow_model, exercise, pick_model, predict, show, stage
    from primechat.lessons.autochat_entropy import EXERCISES
    from primechat.lessons.instruments import talks
    from primechat.stages.autochat import autochat, read_talks
    from primechat.views import talk

    return (
        AutochatConfig,
        EXERCISES,
        autochat,
        borrow_model,
        exercise,
        mo,
        pick_model,
        predict,
        read_talks,
        show,
        stage,
        talk,
        talks,
    )


@app.cell(hide_code=True)
def _(pick_model):
    picker = pick_model(("sft", "rl"), label="Who talks to itself")
    picker
    return (picker,)


@app.cell(hide_code=True)
def _(borrow_model, picker, talks):
    study = talks.Study(picker, borrow_model)
    return (study,)


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 1. Look

    Guess first: does the model's choice become more open or more narrow as it listens to itself?
    """)
    return


@app.cell(hide_code=True)
def _(predict, study):
    _answer, _said = study.tell_trend()
    predict(
        "Over twelve turns of talk with itself, how does the model's entropy change?",
        ("It rises", "It stays", "It falls"),
        _answer,
        why=f"Measured on the conversations below: {_said}. Less than 5 % counts as staying.",
    )
    return


@app.cell(hide_code=True)
def _(show, study):
    show(study.show_strips())
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    Each column is a turn, each row a measure; click a cell and read the turn, its tokens coloured by how open
    the choice was. Look at the controls too: **people** is how talk should look, **shuffled** has the same
    words without a thread, and the **planted loop** shows what the detector must find.

    *What this cannot show:* whether a turn makes sense. A model may say new words all the time and mean
    nothing by them.

    ## How far can the detector be trusted?

    The strips mark where a conversation "goes round". Two readers who did not know that verdict labelled 100
    transcripts: is this talk stuck by its end? (They were two language models with a page of rules, **not
    people**.) Cohen's **kappa** is their agreement beyond chance: 0 is chance, 1 is perfect.
    """)
    return


@app.cell(hide_code=True)
def _(show, talk, talks):
    kappas, shares = talks.judge_detector()
    show(talk.draw_spreads(kappas, "How well two verdicts agree, with 95 % intervals"))
    return (shares,)


@app.cell(hide_code=True)
def _(shares, show, talk):
    show(talk.draw_spreads(shares, "Share of transcripts that are called stuck"))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    It finds what is said again to the letter, and blames no people's talk. It misses loops whose words
    change a little, and flags some that the conversation leaves again.

    *What this cannot show:* how a person would label. All shares here are of chosen transcripts; they say
    nothing about how often a model loops.

    ## 2. Many conversations

    One conversation is an anecdote. The band holds the middle 80 % of the conversations.
    """)
    return


@app.cell(hide_code=True)
def _(AutochatConfig, autochat, picker, stage, study):
    many = stage(
        autochat,
        AutochatConfig(tag=f"{study.tag}-many", model=picker.identifier, n_talks=20, turns=20, resume=True),
        title="Twenty conversations of twenty turns",
    )
    many
    return (many,)


@app.cell(hide_code=True)
def _(many, read_talks, show, study, talk):
    _found = read_talks(many.result.path) if many.result else None
    show(talk.draw_bands(study.trace("entropy", _found), "Entropy, nats a token"))
    return


@app.cell(hide_code=True)
def _(many, read_talks, show, study, talk):
    _found = read_talks(many.result.path) if many.result else None
    show(talk.draw_bands(study.trace("said before", _found), "Share of three-word pieces said before"))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    Until you press Start, the band is of the six conversations above. The lines of people and of their
    shuffled turns are read by the same model, so their entropy is how open *its* choice was.

    *What this cannot show:* low entropy may be a loop, or just good manners (*thank you* is followed by *you
    are welcome*). Only the second plot tells them apart.

    ## 3. Why loops hold

    Say one sentence over and over. How likely does the model hold it the next time?
    """)
    return


@app.cell(hide_code=True)
def _(show, study, talk, talks):
    show(talk.draw_repeats(study.trace_repeats(), talks.SENTENCE))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    A model that has learned to copy finds what was said before ever likelier, so a loop feeds itself. Grey: a
    model of the same shape with random weights, which copies nothing. (A model that has read little may not
    have learned it either.)

    *What this cannot show:* a d20 copies far better than this one, so it holds loops more firmly, but also
    enters them more rarely.

    ## 4. Where does it drift?

    Each turn becomes one point: the mean of the model's inner states over its tokens, drawn along the two
    directions in which the turns differ most.
    """)
    return


@app.cell(hide_code=True)
def _(show, study, talk):
    show(talk.draw_drift(study.map_drift()))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    A way that shrinks to a few places goes round; shuffled turns jump about without a way.

    *What this cannot show:* two of many directions. Points that lie together here may be far apart in the
    rest.

    ## 5. What helps?

    The same openings and seeds under other settings. Bars are 95 % intervals: if two overlap by much, the
    difference may be chance.
    """)
    return


@app.cell(hide_code=True)
def _(AutochatConfig, picker, stage, study, talks):
    variants = stage(
        talks.run_variants,
        AutochatConfig(
            tag=f"{study.tag}-ab", model=picker.identifier, n_talks=8, turns=12, max_new_tokens=32
        ),
        title="Six settings, eight conversations each",
    )
    variants
    return (variants,)


@app.cell(hide_code=True)
def _(show, study, talk, variants):
    _groups = study.compare_groups()
    if variants.result:
        _found = {name: found[0] for name, found in variants.result.measure().items()}
        _groups = {**_found, "people": _groups["people"], "shuffled": _groups["shuffled"]}
    show(talk.draw_spreads(_groups, "Measures of a conversation, mean and 95 % interval"))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    - **distinct-2**: different pairs of words / all pairs; **MTLD**: how long the text keeps finding new
      words. Higher is more varied.
    - **self-BLEU**, **self-repetition**, **compression**: how alike the turns are. Higher is more repetitive;
      read the three together.
    - **Vendi**: how many really different turns there are, by their words.

    *What these cannot show:* all depend on length, so compare conversations of like length only, and none of
    them knows nonsense from sense: shuffled talk scores as well as people's.

    ## 6. Other models

    All chat models on this machine (your own, adapters, students of a distillation, other people's) from the
    same openings.
    """)
    return


@app.cell(hide_code=True)
def _(AutochatConfig, stage, talks):
    models = stage(
        talks.run_models,
        AutochatConfig(tag="lab09-models", n_talks=8, turns=12, max_new_tokens=32),
        title="Each chat model, eight conversations",
    )
    models
    return (models,)


@app.cell(hide_code=True)
def _(models, show, study, talk):
    _people = study.compare_groups()
    side = {name: found[0] for name, found in models.result.measure().items()} if models.result else {}
    side |= {name: _people[name] for name in ("people", "shuffled")}
    show(talk.draw_spreads(side, "Models side by side, mean and 95 % interval"))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    *What this cannot show:* models with other tokenizers write longer turns with as many tokens, and that
    alone moves the measures.

    ## 7. Learning from itself

    Now let the model learn from what it said, talk again, learn again. With nothing else to read, each
    generation forgets some of what the last one knew; this is called **model collapse**. Does it help if half
    of what it reads is people's?
    """)
    return


@app.cell(hide_code=True)
def _(predict):
    predict(
        "In published studies, models read only their own text. What happened to its variety?",
        ("It falls", "It stays", "It rises"),
        "It falls",
        why="Shumailov et al. 2024: rare things go first. Whether it shows in three short generations of a "
        "tiny model, the plots below tell: look at the intervals.",
    )
    return


@app.cell(hide_code=True)
def _(AutochatConfig, picker, stage, study, talks):
    collapse = stage(
        talks.run_collapse,
        AutochatConfig(
            tag=f"{study.tag}-gen",
            model=picker.identifier,
            n_talks=16,
            turns=12,
            max_new_tokens=32,
            generations=3,
        ),
        title="Three generations, twice",
    )
    collapse
    return (collapse,)


@app.cell(hide_code=True)
def _(collapse, show, study, talk):
    people = study.compare_groups()["people"]
    generations = collapse.result.measure() if collapse.result else {}
    show(talk.draw_generations(generations, people, "Vendi"))
    return generations, people


@app.cell(hide_code=True)
def _(generations, people, show, talk):
    show(talk.draw_generations(generations, people, "distinct-2"))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    *What this cannot show:* a few dozen conversations and a few dozen steps are a sketch of collapse. A d20
    forgets more slowly, and rare knowledge first, which no measure here sees. The same study at that size:
    `primechat autochat --model sft/d20 --n_talks 64 --generations 3 --runtime.device cuda`.

    ## Try it yourself
    """)
    return


@app.cell
def _(EXERCISES, exercise):
    def entropy(p): ...

    exercise(EXERCISES[0], entropy)
    return


@app.cell
def _(EXERCISES, exercise):
    def rep(tokens, n): ...

    exercise(EXERCISES[1], rep)
    return


@app.cell
def _(EXERCISES, exercise):
    def see(texts, me): ...

    exercise(EXERCISES[2], see)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## Take it with you

    Every turn with its measures as CSV, and the first heat strip as PNG and SVG. Change the folder and run
    the cell. (The camera above a plot saves that plot.)
    """)
    return


@app.cell
def _(study):
    folder = ""  # for example "runs/talks"
    files = study.export(folder) if folder else []
    files
    return


if __name__ == "__main__":
    app.run()
