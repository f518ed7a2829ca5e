import marimo

app = marimo.App()


@app.cell
def _():
    import time

    from primechat.config import FinetuneConfig
    from primechat.events import CheckpointEvent, DoneEvent, PhaseEvent, StepEvent, TrainResult
    from primechat.labkit.lab import settings, stage, summary

    return (
        CheckpointEvent,
        DoneEvent,
        FinetuneConfig,
        PhaseEvent,
        StepEvent,
        TrainResult,
        settings,
        stage,
        summary,
        time,
    )


@app.cell
def _(CheckpointEvent, DoneEvent, PhaseEvent, StepEvent, TrainResult, time):
    def tell_step(step, steps):
        return StepEvent(
            step=step,
            steps=steps,
            loss_nats=9 - step / 100,
            lr_ratio=1.0,
            grad_norm=1.0,
            update_norm=1.0,
            tokens=64,
            tokens_per_s=640.0,
            elapsed_s=step / 10,
        )

    def train(config, *, on_event, stop):
        on_event(PhaseEvent(name="training", total=config.steps, unit="steps"))
        step = 0
        while step < config.steps and not stop.is_set():
            step += 1
            on_event(tell_step(step, config.steps))
            time.sleep(0.1)
        on_event(CheckpointEvent(step=step, path="model"))
        on_event(DoneEvent(step=step, elapsed_s=1.0, stopped=step < config.steps))
        return TrainResult(
            identifier="sft/d4",
            path="x",
            step=step,
            stopped=step < config.steps,
            val_bpb=1.5,
            n_params=1000,
            tokens=64 * step,
            tokens_per_s=640.0,
            train_s=1.0,
            total_s=1.0,
        )

    return (train,)


@app.cell
def _(FinetuneConfig, settings):
    form = settings(FinetuneConfig(steps=400), ("steps", "seed"))
    form
    return (form,)


@app.cell
def _(form, time):
    time.sleep(1.5)
    late = form.config.steps
    return (late,)


@app.cell
def _(form, late, stage, train):
    assert late == form.config.steps
    run = stage(train, form.config, title="Train")
    run
    return (run,)


@app.cell
def _(run, summary):
    summary(run.result)
    return


if __name__ == "__main__":
    app.run()
