import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Autochat entropy")


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    # A model talks to itself: where does it begin to go round in circles?

    Let a model answer its own answers, again and again. People can talk for hours; small models come to a
    loop, a silence, or the same few words. Here you watch it happen, turn by turn, measure it, and try what
    helps. In the editor, the cells whose code you see are the whole program: `primechat export 09` turns them
    into a script for rented GPUs.

    A model cuts text into **tokens**, short pieces of words. Before each token it gives every possible one a
    probability. **Entropy** says how open that choice was, in nats: 0 means sure, 3 means about as open as
    among twenty equally likely tokens (e³ ≈ 20).
    """)
    return


@app.cell(hide_code=True)
def _():
    import marimo as mo

    from primechat.chat.terminal import choose_chat_model
    from primechat.exercises.autochat_entropy import EXERCISES
    from primechat.labkit.instruments import talks
    from primechat.labkit.lab import (
        Live,
        announce,
        borrow_model,
        exercise,
        in_notebook,
        pick_model,
        predict,
        show,
    )
    from primechat.views import conversations

    return (
        EXERCISES,
        Live,
        announce,
        borrow_model,
        choose_chat_model,
        exercise,
        in_notebook,
        mo,
        pick_model,
        predict,
        show,
        conversations,
        talks,
    )


@app.cell
def _():
    from primechat import AutochatConfig
    from primechat.labkit.instruments.talks import run_many
    from primechat.labkit.lab import settings, stage, summary

    return AutochatConfig, run_many, settings, stage, summary


@app.cell(hide_code=True)
def _(choose_chat_model, pick_model):
    picker = pick_model(("sft", "rl"), label="Who talks to itself", first=choose_chat_model()[0])
    picker
    return (picker,)


@app.cell(hide_code=True)
def _(announce):
    notice = announce(
        "The model says 66 turns in six conversations with itself: some seconds on a quiet laptop, the first "
        "time. Guess meanwhile: after how many turns does it say the same again?"
    )
    notice
    return (notice,)


@app.cell(hide_code=True)
def _(borrow_model, notice, picker, talks):
    study = talks.Study(picker, borrow_model)
    notice.end()
    return (study,)


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    ## 1. Look

    Here the model always takes the token that it holds likeliest. A person said turn 0; all that follows is
    the model's. Each column is a turn, each row a measure; click a cell to read that turn between its
    neighbours.
    """)
    return


@app.cell(hide_code=True)
def _(show, study, talks):
    show(study.show_strips(talks.SURE))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    **What you see.** Look along *said before* and *like its last*: where they fill and stay full, the
    model says again what it has said. Nothing can bring it out: after the same words the likeliest token is
    always the same one. *Entropy* hardly shows it. In the loops of the model that ships it is 2.4 nats, and
    2.7 in the talk without loops below: so small a model is never sure of its next word, not even of one
    that it has just said. Yet 91 % of the three-word pieces in its loops were said before, of that other
    talk 8 %.

    The red line is the verdict of a **detector**, not ours by eye. It marks conversations that go round to
    their end: the last turn ends in one phrase three times in a row, or three of the last four turns take at
    least 70 % of their words from the four turns before them. *Conversation* shows the other five; ↻ marks
    those that go round.

    **Temperature** says how much chance plays a part: at 0 the model always takes the likeliest token, as
    above, at 0.8 it draws each token almost by its probability. Now the same first turns at 0.8.
    """)
    return


@app.cell(hide_code=True)
def _(predict, study):
    rounds = (
        "At temperature 0.8, from the same first turns: do fewer conversations go round, or more?"
    )
    predict(
        rounds,
        ("Fewer", "As many", "More"),
        study.tell_loops,
        why="Counted by the detector, in the conversations below and those above. A ring breaks where chance "
        "takes another token, so most samplers use some; too much of it and the words lose their thread.",
    )
    return (rounds,)


@app.cell(hide_code=True)
def _(rounds, show, study, talks):
    show(study.show_strips(*(name for name in talks.ABOUT if name != talks.SURE)), after=rounds)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    Look at the controls too: **people** is how talk should look, **shuffled** has the same words without a
    thread, and the **planted loop** shows what the detector must find.

    *What this cannot show:* whether a turn makes sense. A model may say new words all the time and mean
    nothing by them.

    ## How far can the detector be trusted?

    Two readers who did not know that verdict labelled
    100 transcripts: is this talk stuck by its end? (They were two language models with a page of rules, **not
    people**.) Cohen's **kappa** is their agreement beyond chance: 0 is chance, 1 is perfect. The lower four
    bars are the detector against each of them.
    """)
    return


@app.cell(hide_code=True)
def _(show, conversations, talks):
    agree = "How well two verdicts agree, with 95 % intervals"
    show(lambda: conversations.draw_spreads(talks.judge_detector()[0], agree, (0, 1)))
    return


@app.cell(hide_code=True)
def _(show, conversations, talks):
    stuck = "Share of transcripts that are called stuck"
    show(lambda: conversations.draw_spreads(talks.judge_detector()[1], stuck, (0, 1)))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    The rule was chosen by every other transcript; the **unseen half** tells how good it is. It finds what is
    said again to the letter and blames none of the 13 talks of people. It misses loops that come back after a
    while, and flags some talks of few words that still go somewhere. (An older rule, which wanted almost the
    same turn three times, reached 0.50 on that half: it missed loops in changed words.)

    *What this cannot show:* how a person would label. All shares here are of chosen transcripts; they say
    nothing about how often a model loops.

    ## 2. Many conversations

    One conversation is an anecdote. Say how many you want, and press Start: twenty of twenty turns take some
    seconds with the model that ships. What was said once is kept, and shown again for the same settings.
    """)
    return


@app.cell
def _(AutochatConfig, picker, settings):
    start = AutochatConfig(
        tag="lab09",
        model=picker.identifier,
        n_conversations=20,
        turns=20,
        max_new_tokens=32,
        temperature=0.8,
        top_k=50,
        resume=True,
    )
    form = settings(
        start,
        ("n_conversations", "turns", "temperature", "repetition_penalty"),
        title="How much talk",
    )
    form
    return (form,)


@app.cell
def _(form, run_many, stage):
    many = stage(run_many, form.config, title="Many conversations")
    many
    return (many,)


@app.cell
def _(many, summary):
    summary(many, title="What was said", notes=["The plots below now show these conversations."])
    return


@app.cell(hide_code=True)
def _(predict, study):
    trend = "Over twelve turns of talk with itself at temperature 0.8, how does the model's entropy change?"
    predict(
        trend,
        ("It rises", "It stays", "It falls"),
        study.tell_trend,
        why="Measured on the six conversations of the first look, the last third of the turns against the "
        "first: {}. Where the interval holds 0, that counts as staying.",
    )
    return (trend,)


@app.cell(hide_code=True)
def _(many, show, study, conversations, trend):
    show(
        lambda: conversations.draw_bands(
            study.trace("entropy", many.result), "Entropy, nats a token"
        ),
        after=trend,
    )
    return


@app.cell(hide_code=True)
def _(many, show, study, conversations):
    said = "Share of three-word pieces said before"
    show(lambda: conversations.draw_bands(study.trace("said before", many.result), said))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    The band holds the middle 80 % of the conversations at temperature 0.8; until you press Start they are the
    six from above. *Always the likeliest* are those of the first strip: the second plot shows their loops
    plainly, the first hardly.
    The lines of people and of their shuffled turns are read by the same model, so their entropy is how open
    *its* choice was.

    *What this cannot show:* whether a larger model's entropy falls in a loop. And where it is low, that may
    be a loop, or just good manners (*thank you* is followed by *you are welcome*): only the second plot tells
    them apart.

    ## 3. Why loops hold

    Say one sentence over and over. How likely does the model hold it the next time?
    """)
    return


@app.cell(hide_code=True)
def _(show, study, conversations, talks):
    show(lambda: conversations.draw_repeats(study.trace_repeats(), talks.SENTENCE))
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
def _(show, study, conversations):
    show(lambda: conversations.draw_drift(study.map_drift()))
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    A way that shrinks to a few places goes round; shuffled turns jump about without a way. The larger the
    dot, the later the turn, and the last one has a ring. At the right, at its height, stands the mean length
    of a hop from turn to turn on this map.

    *What this cannot show:* two of many directions. Points that lie together here may be far apart in the
    rest.

    ## 5. What helps?

    The same openings and seeds under other settings. Bars are 95 % intervals over the conversations: if two
    overlap by much, the difference may be chance.
    """)
    return


@app.cell(hide_code=True)
def _(in_notebook, stage, study, talks):
    variants = (
        stage(
            talks.run_variants,
            study.plan("ab", n_conversations=8),
            title="Six settings, eight conversations each",
        )
        if in_notebook()
        else None
    )
    variants
    return (variants,)


@app.cell(hide_code=True)
def _(show, study, conversations, variants):
    helps = "Measures of a conversation, mean and 95 % interval"
    show(lambda: conversations.draw_spreads(study.compare_groups(variants), helps))
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
def _(in_notebook, stage, study, talks):
    models = (
        stage(
            talks.run_models,
            study.plan("models", n_conversations=8),
            title="Each chat model, eight conversations",
        )
        if in_notebook()
        else None
    )
    models
    return (models,)


@app.cell(hide_code=True)
def _(models, show, study, conversations):
    beside = "Models side by side, mean and 95 % interval"
    show(lambda: conversations.draw_spreads(study.compare_groups(models, only=True), beside))
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
def _(predict, talks):
    variety = (
        "The model reads only its own talk for three generations. "
        "What becomes of the variety of its words?"
    )
    _answer, _said = talks.tell_change(talks.read_recorded(), "only its own talk", "distinct-2")
    predict(
        variety,
        ("It falls", "It stays", "It rises"),
        _answer,
        why="Measured with the model that ships, over three seeds, by distinct-2, the share of different "
        f"pairs of words: {_said}. In brackets: {talks.describe_recorded()}. Rare things go first "
        "(Shumailov et al. 2024).",
    )
    return (variety,)


@app.cell(hide_code=True)
def _(in_notebook, stage, study, talks):
    collapse = (
        stage(
            talks.run_collapse,
            study.plan("gen", n_conversations=16, generations=3),
            title="Three generations with and without people's talk, three seeds: some minutes",
        )
        if in_notebook()
        else None
    )
    collapse
    return (collapse,)


@app.cell(hide_code=True)
def _(collapse, show, study, conversations, talks, variety):
    def draw_generations(measure):
        ran = collapse is not None and collapse.result
        found = collapse.result.measure() if ran else talks.read_recorded()
        return conversations.draw_generations(found, study.compare_groups()["people"], measure)

    show(lambda: draw_generations("Vendi"), after=variety)
    return (draw_generations,)


@app.cell(hide_code=True)
def _(draw_generations, show, variety):
    show(lambda: draw_generations("distinct-2"), after=variety)
    return


@app.cell(hide_code=True)
def _(mo):
    mo.md(r"""
    Until you press Start, the plots show what was measured with the model that ships when primechat was
    made, with bars that are somewhat too short (see above); then they show yours, with 95 % intervals over
    the three seeds. Three seeds say little of how much they differ, so these bars are long.

    *What this cannot show:* a few dozen conversations and a few dozen steps are a sketch of collapse. A d20
    forgets more slowly, and rare knowledge first, which no measure here sees. The same study at that size:
    `primechat export 09 --depth 20`.

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

    Every turn with its measures as CSV, and the first heat strip as PNG and SVG. Name a folder and tick the
    box. (The camera above a plot saves that plot.)
    """)
    return


@app.cell(hide_code=True)
def _(Live, show, study):
    show(
        Live(study.save, folder="runs/talks", write=False, labels={"write": "Write the files now"})
    )
    return


if __name__ == "__main__":
    app.run()
