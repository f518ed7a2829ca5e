"""The loss of distillation: a student learns a teacher's probabilities, in addition to the text or alone.

Hides: the chunks in which the two (B*T, V) matrices of logits are computed, and the file that may supply the
teacher's likeliest tokens instead of the teacher. Targets of V and above mark tokens that the student wrote
itself (`mark_own`); on those it learns from the teacher alone.
Reference: Hinton et al. 2015; Sanh et al. 2019 (the term on hidden states); Agarwal et al. 2024 (on-policy).
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from primechat.files.paths import make_folder
from primechat.model.attention import Documents
from primechat.model.gpt import GPT
from primechat.model.losses import bucket_top, chunk_rows, diverge

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The terms of the loss: alpha * CE + (1 - alpha) * T^2 * divergence + hidden * (1 - cosine)."""

    alpha: float = 0.1
    temperature: float = 2.0
    kind: str = "forward"
    beta: float = 0.5
    hidden: float = 0.0
    top_k: int = 0


def mark_own(targets: Tensor, vocab_size: int) -> Tensor:
    """Return targets marked as tokens that the student wrote itself; ignored ones stay ignored."""
    return torch.where(targets >= 0, targets + vocab_size, targets)


class TeacherCache:
    """The teacher's k likeliest tokens for rows of text, on disk: rows seen before cost no forward pass.

    Three files grow together: the hashes of the rows, token ids, and log-probabilities at the temperature of
    the loss in float16.
    """

    def __init__(self, folder: Path, k: int, sequence_len: int) -> None:
        self.k, self.sequence_len = k, sequence_len
        make_folder(folder)
        self.paths = folder / "rows.bin", folder / "ids.bin", folder / "logprobs.bin"
        self.places, self.rows, self.hits, self.misses = dict[bytes, int](), 0, 0, 0
        self.is_full = False  # whether the disk is full; then nothing more is written
        self.append((), (), ())

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return token ids (B, T, k) and their log-probabilities, or None if any row is new."""
        names = [self.name(row) for row in ids]
        if not all(name in self.places for name in names):
            return None
        places = np.array([self.places[name] for name in names])
        self.hits += len(places)
        shape = (self.rows, self.sequence_len, self.k)
        tokens = np.memmap(self.paths[1], np.uint32, "r", shape=shape)[places]
        logs = np.memmap(self.paths[2], np.float16, "r", shape=shape)[places]
        found = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(logs.astype(np.float32))
        return found[0].to(ids.device), found[1].to(ids.device)

    def add(self, ids: Iterable[Tensor], tokens: Iterable[Tensor], logs: Iterable[Tensor]) -> None:
        """Store rows (B, T) with the teacher's tokens and log-probabilities (B, T, k), if they fit."""
        known = self.rows
        try:
            if not self.is_full:
                self.append(ids, tokens, logs)
        except OSError as error:
            # How much of these rows was written is unknown; the next run truncates incomplete rows.
            self.places = {name: place for name, place in self.places.items() if place < known}
            self.rows, self.is_full = known, True
            logger.warning(
                "%s cannot be written (%s): the training goes on and asks the teacher each time",
                self.paths[0].parent,
                error.strerror,
            )

    def append(
        self, ids: Iterable[Tensor], tokens: Iterable[Tensor], logs: Iterable[Tensor]
    ) -> None:
        """Read the rows that other runs and ranks wrote, truncate an incomplete last one, and write new rows.

        Raises:
            OSError: the files cannot be written.
        """
        widths = 16, self.sequence_len * self.k * 4, self.sequence_len * self.k * 2
        with ExitStack() as stack:
            # The lock is on the first file, which is closed last, so it covers all writing.
            files = [stack.enter_context(path.open("a+b")) for path in self.paths]
            with suppress(OSError):  # some network disks have no locks
                fcntl.flock(files[0], fcntl.LOCK_EX)

            # Keep the rows that are complete in all files.
            whole = min(file.seek(0, 2) // width for file, width in zip(files, widths, strict=True))
            for file, width in zip(files, widths, strict=True):
                file.truncate(whole * width)
            files[0].seek(self.rows * 16)
            self.places |= {files[0].read(16): i for i in range(self.rows, whole)}
            self.rows = whole

            # Write the rows that are still new.
            for row, t, p in zip(ids, tokens, logs, strict=True):
                if (name := self.name(row)) not in self.places:
                    parts = (
                        t.cpu().numpy().astype(np.uint32),
                        p.float().cpu().numpy().astype(np.float16),
                    )
                    for file, data in zip(
                        files, (name, *(x.tobytes() for x in parts)), strict=True
                    ):
                        file.write(data)
                    self.places[name], self.rows, self.misses = (
                        self.rows,
                        self.rows + 1,
                        self.misses + 1,
                    )

    def name(self, row: Tensor) -> bytes:
        """Return the 16-byte hash that identifies a row of ids."""
        return hashlib.blake2b(
            row.cpu().numpy().astype(np.int64).tobytes(), digest_size=16
        ).digest()


class DistillLoss:
    """The summed loss of a micro-batch; with `mix.hidden` it also compares hidden states by a projector."""

    def __init__(
        self,
        student: GPT,
        teacher: GPT,
        mix: Mix,
        cache: TeacherCache | None = None,
        bos_id: int = -1,
    ) -> None:
        self.student, self.teacher, self.mix, self.cache = student, teacher, mix, cache
        self.bos_id = bos_id  # as `GPT.loss` takes it

    def __call__(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the loss summed over the targets that are not ignored, in nats."""
        # The student's states at the targets that are not ignored.
        mix, student, V = self.mix, self.student, self.student.vocab_size
        keep = (targets >= 0).flatten()
        own = targets.flatten()[keep] >= V
        words = targets.flatten()[keep] % V
        h = student.hidden(ids, documents=self.find_documents(ids))
        hs = h.flatten(0, 1)[keep]

        # Without a term on the teacher, the text is enough.
        if mix.alpha == 1 and not mix.hidden:
            return self.sum_chunks(hs, None, None, words, own)

        # The teacher's likeliest tokens from the file, or its final states.
        top = self.cache.find(ids) if self.cache is not None and not mix.hidden else None
        ht = None
        if top is None:
            ht = self.read_teacher(ids)
            if self.cache is not None:
                top = self.name_top(ht)
                self.cache.add(ids, *top)
        picked = None if top is None else (top[0].flatten(0, 1)[keep], top[1].flatten(0, 1)[keep])

        # The terms on the text and the teacher's distribution, then the term on hidden states.
        total = self.sum_chunks(
            hs, None if ht is None else ht.flatten(0, 1)[keep], picked, words, own
        )
        if mix.hidden and ht is not None:
            projected = student.get_submodule("projector")(hs.float())
            near = F.cosine_similarity(projected, ht.flatten(0, 1)[keep].float(), dim=-1)
            total = total + mix.hidden * (1 - near).sum()
        return total

    def read_teacher(self, ids: Tensor) -> Tensor:
        """Return the teacher's final states (B, T, C)."""
        teacher = self.teacher
        if teacher.device != ids.device:
            teacher.to(ids.device)
        teacher.compute_dtype = self.student.compute_dtype
        with torch.no_grad():
            return teacher.hidden(ids, documents=self.find_documents(ids))

    def find_documents(self, ids: Tensor) -> Documents | None:
        """Return the documents of packed rows, or None if each row is one text."""
        return None if self.bos_id < 0 else Documents.find(ids, self.bos_id)

    def name_top(self, ht: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's k likeliest tokens at each position and their log-probabilities (B, T, k).

        They are rounded as in the file, so that a row gives the same loss whether it is new or not.
        """
        with torch.no_grad():
            logits = [self.teacher.logits(part) / self.mix.temperature for part in ht]
            best = [torch.log_softmax(z, -1).topk(self.mix.top_k, -1) for z in logits]
        return torch.stack([b.indices for b in best]), torch.stack(
            [b.values for b in best]
        ).half().float()

    def sum_chunks(
        self,
        hs: Tensor,
        ht: Tensor | None,
        top: tuple[Tensor, Tensor] | None,
        words: Tensor,
        own: Tensor,
    ) -> Tensor:
        """Return the summed loss, computed chunk by chunk; the backward pass recomputes the logits.

        Args:
            hs: the student's final states (n, C).
            ht: the teacher's final states (n, C'), or None.
            top: the teacher's likeliest tokens and their log-probabilities (n, k), used instead of ht, or
                None.
            words: target ids (n,).
            own: (n,) bool, tokens that the student wrote itself.
        """
        step = chunk_rows(len(hs), 2 * self.student.vocab_size, hs.device.type)
        total = hs.new_zeros((), dtype=torch.float32)
        for i in range(0, len(hs), step):
            part = slice(i, i + step)
            teach = None if ht is None or top is not None else ht[part]
            picked = None if top is None else (top[0][part], top[1][part])
            score = torch.utils.checkpoint.checkpoint(
                self.score, hs[part], teach, picked, words[part], own[part], use_reentrant=False
            )
            total = total + score
        return total

    def score(
        self,
        hs: Tensor,
        ht: Tensor | None,
        top: tuple[Tensor, Tensor] | None,
        words: Tensor,
        own: Tensor,
    ) -> Tensor:
        """Return the summed loss of one chunk; arguments as for `sum_chunks`."""
        # The term on the text.
        mix, z = self.mix, self.student.logits(hs)  # (n, V)
        T = mix.temperature
        ce = F.cross_entropy(z, words, reduction="none")
        if ht is None and top is None:
            return torch.where(own, 0.0, ce).sum()

        # The distributions of student and teacher; with top tokens, the others share one bucket.
        log_q = torch.log_softmax(z / T, -1)
        if top is not None:
            log_q = bucket_top(log_q, top[0])
            rest = torch.log1p(-top[1].exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
            log_p = torch.cat([top[1], rest], -1)
        else:
            assert ht is not None, "the teacher or its file"
            with torch.no_grad():
                log_p = torch.log_softmax(self.teacher.logits(ht) / T, -1)

        # T^2 keeps the gradients of the divergence about as large at any temperature (Hinton et al. 2015).
        far = T * T * diverge(log_q, log_p, mix.kind, mix.beta)
        return torch.where(own, far, mix.alpha * ce + (1 - mix.alpha) * far).sum()


def make_projector(n_student: int, n_teacher: int, seed: int) -> nn.Linear:
    """Return the learned map from the student's final states to the teacher's."""
    projector = nn.Linear(n_student, n_teacher, bias=False)
    with torch.no_grad():
        projector.weight.normal_(std=n_student**-0.5, generator=torch.Generator().manual_seed(seed))
    return projector
