"""Mapped tensors: no copy, one mapping a file, writable, never written back, gone with their last tensor."""

import gc
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transfer_helpers import CPU, FaultySource, Saved, load, same

import weightlift as wl
from weightlift.checkpoint.entry import ShardFile, TensorEntry
from weightlift.errors import CheckpointChanged
from weightlift.transfer import mapped
from weightlift.transfer.jobs import Job

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def mappings(path):
    with open("/proc/self/maps") as file:
        return [
            tuple(int(x, 16) for x in line.split()[0].split("-")) for line in file if line.rstrip().endswith(str(path))
        ]


@linux
def test_one_mapping_shared_by_all(saved):
    values = saved.load(workers=8)
    found = mappings(saved.path)
    assert len(found) == 1
    ((start, end),) = found
    for key, value in values.items():
        assert same(value, saved.tensors[key])
        if value.numel():
            assert start <= value.data_ptr() < end
    kept = values["scalar"]
    del values, value
    gc.collect()
    assert len(mappings(saved.path)) == 1 and kept.item() == 3.5
    del kept
    gc.collect()
    assert mappings(saved.path) == []


@linux
def test_no_page_is_touched_and_no_descriptor_kept(saved):
    before = len(os.listdir("/proc/self/fd"))
    values = saved.load()
    assert len(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/smaps") as file:
        text = file.read()
    block = text[text.index(str(saved.path)) :]
    assert "Private_Dirty:         0 kB" in block[: block.index("VmFlags")]
    assert values


@linux
def test_files_are_read_in_order_where_the_system_takes_the_hint(saved, monkeypatch):
    """It reads ahead twice as far; the first touches of cold files took half as long again without."""
    asked = []

    def advise(fd, start, nbytes, advice):
        asked.append((os.path.realpath(f"/proc/self/fd/{fd}"), start, nbytes, advice))
        raise OSError("not here")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    values = saved.load()
    assert asked == [(str(saved.path), 0, 0, os.POSIX_FADV_SEQUENTIAL)]
    assert all(same(value, saved.tensors[key]) for key, value in values.items())


def test_writable_and_never_written_back(saved):
    content = saved.path.read_bytes()
    first, second = saved.load(), saved.load()
    for value in first.values():
        value.zero_()
    assert saved.path.read_bytes() == content
    assert all(same(second[k], t) for k, t in saved.tensors.items())


def test_each_result_is_its_own_storage(saved):
    values = saved.load()
    a, b = values["small.000"], values["small.001"]
    assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()
    assert a.is_leaf and not a.requires_grad and not a.is_inference()


def test_overlapping_entries_are_not_tied_by_accident(saved):
    entry = saved.entries["large.a"]
    first, second = load([Job("x", entry, entry.dtype, CPU), Job("y", entry, entry.dtype, CPU)], files=[saved.shard])
    first.zero_()
    assert same(second, saved.tensors["large.a"])


def test_zero_size_only_and_an_empty_file(tmp_path):
    path = tmp_path / "empty"
    path.touch()
    stat = path.stat()
    shard = ShardFile(path, "safetensors", 0, stat.st_mtime_ns, stat.st_ino, stat.st_dev)
    entry = TensorEntry("z", (0, 3), torch.float32, path, 0, 0)
    for copy in (False, True):
        (value,) = load([Job("z", entry, torch.float16, CPU)], files=[shard], copy=copy)
        assert value.shape == (0, 3) and value.dtype == torch.float16


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("how", ["replaced", "cut", "grown", "touched", "gone", "on another device"])
def test_a_changed_file_is_refused_before_anything_is_written(saved, how, copy):
    if how == "replaced":
        other = saved.path.with_suffix(".new")
        other.write_bytes(saved.path.read_bytes())
        os.utime(other, ns=(saved.shard.mtime_ns, saved.shard.mtime_ns))
        other.replace(saved.path)
    elif how == "on another device":
        saved.shard = replace(saved.shard, device=saved.shard.device + 1)
    elif how == "cut":
        os.truncate(saved.path, 1000)
    elif how == "grown":
        with saved.path.open("ab") as file:
            file.write(b"x")
    elif how == "touched":
        os.utime(saved.path, ns=(1, 1))
    else:
        saved.path.unlink()
    into = {"large.a": torch.full((1500, 1201), 7.0)} if copy else {}
    with pytest.raises(CheckpointChanged) as caught:
        saved.load(saved.jobs(into=into), copy=copy)
    assert caught.value.problems[0].file == saved.path
    assert not copy or bool((into["large.a"] == 7).all())


def test_a_file_that_changes_while_it_is_mapped(saved):
    class Source(FaultySource):
        def open(self, file):
            handle = super().open(file)
            os.utime(saved.path, ns=(5, 5))
            return handle

    source = Source()
    with pytest.raises(CheckpointChanged, match="mapped"):
        saved.load(source=source)
    assert source.open_handles == 0


def test_many_files(tmp_path):
    all_saved = [Saved(tmp_path / f"{i}.safetensors", {"w": torch.full((10,), float(i))}) for i in range(30)]
    jobs = [s.jobs()[0] for s in all_saved]
    for copy in (False, True):
        values = load(jobs, files=[s.shard for s in all_saved], copy=copy)
        assert [v[0].item() for v in values] == list(range(30))


@linux
def test_big_destinations_lie_on_huge_pages_and_can_be_given_back(saved):
    value = saved.load(copy=True)["large.a"]
    address = value.data_ptr()
    assert address % (2 << 20) == 0

    def mapped():
        with open("/proc/self/maps") as file:
            ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in file]
        return any(start <= address < end for start, end in ranges)

    assert mapped()
    value.add_(1)
    del value
    gc.collect()
    assert wl.empty_cache() >= 4 << 20
    assert not mapped()


def test_mappings_are_found_by_address_and_the_younger_of_two_counts():
    a, b, c, d = (Path(name) for name in "abcd")
    assert mapped._by_address([(100, 50, a), (0, 10, b), (150, 10, c)]) == [(0, 10, b), (100, 150, a), (150, 160, c)]
    # A mapping whose entry is not gone yet: younger ones lie where it was.
    assert mapped._by_address([(100, 50, a), (120, 10, b), (90, 20, c)]) == [(90, 110, c), (120, 130, b)]
    assert mapped._by_address([(120, 10, b), (100, 50, a)]) == [(100, 150, a)]
    assert mapped._by_address([(100, 20, a), (120, 10, b), (100, 50, c), (140, 5, d)]) == [(140, 145, d)]
