"""Rows of a cache of teacher outputs: what a row holds, the mark of its image, and the frames it lies in on the disk.

A row is the key, the mark and each teacher's logits: all of them as they were given (exact), all in half precision
(fp16), or the `top` largest with one level for the others.

fp16    z - max(z) is kept. Rounding moves a logit at the distance d from the largest by d / 2048 at most, and its
        probability at T is at most exp(-d / T): no probability moves by more than (1 / e + ln C) / 2048, at any T.
top     the others share the probability that they have at T: z = T log(mean of exp(z / T)). After Shen and Xing 2021,
        arXiv:2112.01528 (the rest is spread evenly), which knows T = 1 alone. At T the gradients of the kept classes
        are exact.

A frame is what one batch adds to a file, in one write: HEADER, with the sha256 of the rows and a hash of its own, then
the rows. A killed run leaves at most one frame that is not whole, at the end of its file: it is not read. Every other
frame that is not as it was written is an error.

Letters: n images, K teachers, C classes, k of them kept.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aerogel.errors import AerogelError

MAGIC = b"aeroteac"
HEADER = struct.Struct("<8s32sQQ32s8s")  # MAGIC, owner, rows, bytes of a row, sha256 of the rows, hash of the header
LOWEST = -65504.0  # of half precision
MARKED = 2**22  # numbers of the inputs that are looked at at once

Records = np.ndarray  # (n,) of a layout's record


@dataclass(frozen=True)
class Layout:
    """What a row holds. dtype: of the logits as the teacher gives them. top, temperature: see the head of this file."""

    members: int
    classes: int
    dtype: str
    kept: str
    top: int | None = None
    temperature: float | None = None

    @property
    def record(self) -> np.dtype[Any]:
        fields: list[Any] = [("key", "<i8"), ("mark", "<i8")]
        values = {"fp16": "<f2", "float32": "<f4", "float64": "<f8"}["fp16" if self.kept == "fp16" else self.dtype]
        if self.top is None:
            return np.dtype([*fields, ("logits", values, (self.members, self.classes))])
        shape = (self.members, self.top)
        return np.dtype([
            *fields, ("classes", "<u4", shape), ("logits", values, shape), ("rest", values, (self.members,))
        ])  # fmt: skip

    def packed(self, keys: Tensor, marks: Tensor, logits: Tensor) -> Records:
        """(n,), (n,), (K, n, C) -> (n,) records."""
        records = np.zeros(len(keys), self.record)
        records["key"], records["mark"] = keys.cpu().numpy(), marks.cpu().numpy()
        z = logits.detach().cpu().transpose(0, 1)  # (n, K, C)
        if self.kept == "fp16":
            z = (z - z.amax(-1, keepdim=True)).clamp(min=LOWEST)
        if self.top is None:
            records["logits"] = z.numpy()
            return records
        largest = z.topk(self.top)
        records["classes"], records["logits"] = largest.indices.numpy(), largest.values.numpy()
        records["rest"] = _level(z, largest.indices, self.temperature or 1.0).clamp(min=LOWEST).numpy()
        return records

    def unpacked(self, records: Records) -> Tensor:
        """(n,) records -> logits (K, n, C), of the dtype in which the teacher gave them."""
        dtype = getattr(torch, self.dtype)
        logits = torch.from_numpy(np.ascontiguousarray(records["logits"])).to(dtype)
        if self.top is not None:
            rest = torch.from_numpy(np.ascontiguousarray(records["rest"])).to(dtype)
            places = torch.from_numpy(records["classes"].astype(np.int64))
            logits = rest[..., None].repeat(1, 1, self.classes).scatter(-1, places, logits)
        return logits.transpose(0, 1).contiguous()


def _level(z: Tensor, places: Tensor, temperature: float) -> Tensor:
    """The logit with which each of the others has their mean probability at T: (n, K, C), (n, K, k) -> (n, K)."""
    others = z.scatter(-1, places, -torch.inf) / temperature
    count = torch.tensor(float(z.shape[-1] - places.shape[-1]), dtype=z.dtype)
    return temperature * (others.logsumexp(-1) - count.log())


def marks(inputs: Tensor) -> Tensor:
    """One number an image that another image hardly ever has: (n, ...) -> int64 (n,).

    The sum of its bits, each word times its own odd weight, modulo 2^64: the same on every device, and in every order
    in memory.
    """
    if not len(inputs):
        return torch.zeros(0, dtype=torch.int64, device=inputs.device)
    size = inputs[0].numel() * inputs.element_size()
    rows = max(1, MARKED * 4 // max(1, size))
    return torch.cat([_marks(part) for part in inputs.detach().split(rows)])


def _marks(inputs: Tensor) -> Tensor:
    flat = inputs.flatten(1).contiguous()
    words = flat.view(torch.int32) if flat.element_size() % 4 == 0 else flat.view(torch.uint8)
    draw = np.random.default_rng(words.shape[1]).integers(-(2**63), 2**63, words.shape[1], dtype=np.int64) | 1
    return (words.to(torch.int64) * torch.from_numpy(draw).to(words.device)).sum(1)


def framed(records: Records, owner: bytes) -> bytes:
    """The bytes that add these rows to a file. owner: sha256 of what the cache is for."""
    body = records.tobytes()
    head = HEADER.pack(MAGIC, owner, len(records), records.itemsize, hashlib.sha256(body).digest(), b"")
    return head[:-8] + _hash(head) + body


def frames(held: memoryview, start: int, owner: bytes, layout: Layout, where: str) -> Iterator[tuple[int, Records]]:
    """The whole frames of a file from byte `start` on: (place of its first row, its rows), checked. Nothing is copied.

    Raises AerogelError where one is not as it was written, or of another cache.
    """
    while start + HEADER.size <= len(held):
        head = bytes(held[start : start + HEADER.size])
        magic, found, rows, itemsize, digest, own = HEADER.unpack(head)
        if magic != MAGIC or own != _hash(head):
            raise AerogelError(f"cache: {where} is damaged at byte {start:,}; delete this file, its rows are made anew")
        if found != owner or itemsize != layout.record.itemsize:
            raise AerogelError(f"cache: {where} was written for another cache; delete this file")
        first = start + HEADER.size
        start = first + rows * itemsize
        if start > len(held):
            return  # a run was killed here, or is writing
        if hashlib.sha256(held[first:start]).digest() != digest:
            raise AerogelError(
                f"cache: {where} is damaged between bytes {first:,} and {start:,}, its sha256 is another; delete this "
                "file, its rows are made anew"
            )
        yield first, np.frombuffer(held, layout.record, rows, first)


def _hash(head: bytes) -> bytes:
    return hashlib.blake2b(head[:-8], digest_size=8).digest()
