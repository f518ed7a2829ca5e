"""Plain words for the fields of a config, as forms show them above the field's own name.

Hides: nothing. A field that is missing here is shown by its own name; what it does stands beside it, from
the config itself.
"""

from __future__ import annotations

TITLES = {  # by the whole name where one word means several things
    "tag": "Name of the run",
    "resume": "Go on with the run of this name",
    "corpus": "Text to learn from",
    "n_shards": "Files of text to fetch",
    "keep_shards": "Files of text to keep on disk",
    "skip_bad_shards": "Go on without a broken file",
    "tokenizer": "Folder of the tokenizer",
    "batch_tokens": "Tokens read for each step",
    "steps": "Steps of training",
    "seconds": "Seconds of training",
    "tokens_per_param": "Tokens for each parameter",
    "seed": "Seed of all chance",
    "model": "Model",
    "model.sequence_len": "Tokens it sees at once",
    "model.vocab_size": "Tokens in the vocabulary",
    "model.vocab_multiple": "Round the vocabulary up to a multiple of",
    "n_layer": "Number of blocks",
    "n_head": "Attention heads",
    "n_kv_head": "Heads for keys and values",
    "n_embd": "Width",
    "value_embeddings": "Trick: value embeddings",
    "residual_scalars": "Trick: scaled residual stream",
    "smear": "Trick: smear",
    "backout": "Trick: backout",
    "qk_gain": "Trick: sharper attention",
    "rope_base": "Slowest turn of the positions",
    "rope_dtype": "Number format of the positions",
    "logit_softcap": "Largest score of a token",
    "window_pattern": "How far back each block sees",
    "matrix_lr": "Learning rate of the matrices",
    "embedding_lr": "Learning rate of the embeddings",
    "unembedding_lr": "Learning rate of the output head",
    "scalar_lr": "Learning rate of single numbers",
    "added_lr": "Learning rate of what is added",
    "weight_decay": "Pull of the weights to zero",
    "momentum": "Momentum",
    "grad_clip": "Longest gradient",
    "warmup_ratio": "Share of the run to speed up in",
    "warmdown_ratio": "Share of the run to slow down in",
    "final_lr_ratio": "Learning rate at the end",
    "eval_every": "Steps between measurements",
    "eval_tokens": "Tokens of a measurement",
    "last_eval_tokens": "Tokens of the last measurement",
    "sample_every": "Steps between samples",
    "save_every": "Steps between saves",
    "keep_checkpoints": "Saves to keep",
    "snapshots": "Keep small copies along the way",
    "snapshot_budget_mb": "Room for these, in megabytes",
    "device": "Processor",
    "dtype": "Number format",
    "threads": "CPU threads",
    "compile": "Compile the model first",
    "micro_batch_rows": "Rows at a time",
    "checkpoint_blocks": "Save memory, compute twice",
    "max_hours": "Stop after hours",
    "max_dollars": "Stop after dollars",
    "dollars_per_hour": "Price of the machine, dollars an hour",
    "base": "Model to start from",
    "dialogues": "Conversations to learn from",
    "language": "Language",
    "personas": "Tell the model who it is",
    "dialogue_shards": "Files of conversations to fetch",
    "layout": "How conversations are laid out",
    "learn": "Whose words it learns",
    "general": "Text that it may forget",
    "rank": "Size of the adapter (its rank)",
    "ranks": "Sizes of the adapter (its ranks)",
    "alpha": "Strength of the adapter",
    "DistillConfig.alpha": "Weight of the text itself",
    "rslora": "Strength falls more slowly with size",
    "dropout": "Share of inputs to hide",
    "teacher": "Teacher",
    "size": "Size of the student",
    "temperature": "Temperature",
    "loss": "How teacher and student are compared",
    "beta": "Share of the teacher in the mixture",
    "hidden": "Weight of the inner state",
    "top_k": "Likeliest tokens to keep",
    "top_p": "Likeliest tokens, by their share",
    "on_policy": "Share that the student writes itself",
    "switches": "Tricks to take away",
    "seeds": "Runs of each",
    "depth": "Number of blocks",
    "depths": "Numbers of blocks",
    "gpus": "Machine to rent",
    "output": "Folder to write",
    "rehearse": "Try it here first",
    "names": "What to compare",
    "tokens": "Tokens that each reads",
    "held_out": "Blocks of the model to forecast",
    "vocab_size": "Tokens in the vocabulary",
    "partner": "Second speaker",
    "openings": "First turns",
    "n_talks": "Conversations",
    "max_new_tokens": "Longest turn, in tokens",
    "AutochatConfig.batch_rows": "Conversations at once",
    "human_every": "Turns between words of a person",
    "human_share": "Share of people's talk to learn from",
    "tune_steps": "Steps of each generation",
    "max_chars": "Characters to learn from",
    "max_doc_chars": "Characters of each document",
}


def name_field(name: str, config: str = "") -> str:
    """Return a field's title; `config` is the name of its class, where a word means two things.

    >>> name_field("model.n_layer"), name_field("a.new_one"), name_field("alpha", "DistillConfig")
    ('Number of blocks', 'New one', 'Weight of the text itself')
    """
    last = name.rpartition(".")[2]
    return (
        TITLES.get(f"{config}.{name}")
        or TITLES.get(name)
        or TITLES.get(last)
        or last.replace("_", " ").capitalize()
    )
