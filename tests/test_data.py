"""The image cache on local sources: what goes in comes out, in a fixed order, and a wrong source gets one sentence."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_stand_in import numbered_png, numbers, parquet_bytes
from PIL import Image

from ld_data import SAMPLES, DataError, duplicates, open_images, original_sizes, to_model_range
from ld_utils import from_uint8

pytestmark = pytest.mark.timeout(120)
ROOT = Path(__file__).resolve().parent.parent
CATS = ROOT.parent / "shared" / "data" / "afhq-cat-128"


@pytest.fixture
def opened(tmp_path):
    """`open_images` with small pictures and a cache below tmp_path; closes what it opened."""
    caches = []

    def open_one(source, **options):
        caches.append(open_images(source, **{"image_size": 16, "cache_dir": tmp_path / "cache", **options}))
        return caches[-1]

    yield open_one
    for cache in caches:
        cache.close()


def folder_of(path, count, first=0, side=40):
    """A folder with two class folders of numbered pictures."""
    for number in range(first, first + count):
        file = path / ("even" if number % 2 == 0 else "odd") / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(numbered_png(number, side))
    return path


def zip_of(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(name, numbered_png(number))
    return path


# ---- sources ----


def test_a_folder_with_class_folders(opened, tmp_path):
    cache = opened(folder_of(tmp_path / "pictures", 30)).wait()
    assert sorted(numbers(cache.images)) == list(range(30))
    assert cache.complete
    assert cache.report["seen"] == cache.report["rows"] == len(cache) == 30


def test_the_split_is_a_folder_if_there_is_one(opened, tmp_path):
    folder_of(tmp_path / "pictures" / "train", 10)
    folder_of(tmp_path / "pictures" / "test", 5, first=100)
    assert sorted(numbers(opened(tmp_path / "pictures").wait().images)) == list(range(10))
    assert sorted(numbers(opened(tmp_path / "pictures", split="test").wait().images)) == list(range(100, 105))


def test_files_that_are_no_pictures_are_left_alone(opened, tmp_path):
    folder = folder_of(tmp_path / "pictures", 4)
    for name in ("notes.txt", ".hidden.png", "__MACOSX/_0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no picture")
    cache = opened(folder).wait()
    assert len(cache) == cache.report["seen"] == 4


def test_a_zip_is_read_in_memory_and_never_unpacked(opened, tmp_path):
    names = ["pictures/0.png", "../../outside.png", "/absolute.png", "pictures/deep/3.JPG"]
    cache = opened(zip_of(tmp_path / "pictures.zip", names)).wait()
    assert sorted(numbers(cache.images)) == [0, 1, 2, 3]
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"pictures.zip", "images.u8", "state.json", "lock", "filler.log"}


def test_a_parquet_folder_and_a_parquet_file(opened, tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    for shard in range(2):
        file = tmp_path / "set" / "data" / f"train-0000{shard}-of-00002.parquet"
        file.write_bytes(parquet_bytes([numbered_png(20 * shard + row) for row in range(20)]))
    assert sorted(numbers(opened(tmp_path / "set").wait().images)) == list(range(40))
    assert numbers(opened(file).wait().images) == list(range(20, 40))


def test_pictures_in_memory(opened):
    rgb = np.zeros((20, 20, 3), np.uint8)
    rgb[..., 0] = 200
    grey = np.full((20, 20), 200, np.uint8)
    pictures = [
        Image.fromarray(rgb),
        rgb,
        torch.from_numpy(rgb).permute(2, 0, 1),
        rgb.astype(np.float32) / 255,
        grey,
        Image.fromarray(grey.astype(np.uint16) * 257),
        Image.fromarray(grey.astype(np.float32)),
        Image.fromarray(rgb).convert("CMYK"),
    ]
    cache = opened(pictures).wait()
    red = [200, 0, 0]
    seen = sorted(cache.images[:, :, 8, 8].tolist())
    assert seen == sorted([red] * 5 + [[200] * 3] * 3)
    assert opened(pictures).complete


def test_original_sizes_of_a_folder_and_a_zip(tmp_path):
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for name, size in (("a.png", (30, 20)), ("deep/b.jpg", (7, 9))):
        Image.new("RGB", size).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for path in (tmp_path / "pictures").rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path))
    assert original_sizes(tmp_path / "pictures") == original_sizes(tmp_path / "pictures.zip") == [(30, 20), (7, 9)]
    assert original_sizes("owner/on-the-hub") == []
    assert len(original_sizes("samples")) == 488


def test_duplicates_are_rows_with_equal_pixels(opened, tmp_path):
    folder = folder_of(tmp_path / "set", 5)
    (tmp_path / "set" / "again.png").write_bytes((tmp_path / "set" / "even" / "0000.png").read_bytes())
    images = opened(folder).wait().images
    (group,) = duplicates(images)
    assert len(group) == 2 and np.array_equal(images[group[0]], images[group[1]])
    assert duplicates(images[:0]) == []


def test_the_samples(opened):
    if not SAMPLES.exists():
        pytest.skip("sample_data/ is not in this checkout")
    cache = opened("samples").wait()
    assert len(cache) == 488
    assert not cache.report["dropped"]


@pytest.mark.skipif(not CATS.exists(), reason="the cats are not beside this checkout")
def test_real_pictures_come_out_alike_from_parquet_and_from_files(opened, tmp_path):
    import pyarrow.parquet as pq

    source = tmp_path / "set"
    source.mkdir()
    table = pq.read_table(sorted(CATS.rglob("*.parquet"))[0]).slice(0, 60)
    pq.write_table(table, source / "train.parquet")
    files = tmp_path / "files"
    files.mkdir()
    for index, cell in enumerate(table["image"].to_pylist()):
        (files / f"{index:03d}.jpg").write_bytes(cell["bytes"])
    one, other = opened(source, image_size=64).wait(), opened(files, image_size=64).wait()
    assert len(one) == len(other) == 60
    assert sorted(row.tobytes() for row in one.images) == sorted(row.tobytes() for row in other.images)
    plain = Image.open(files / "000.jpg").convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    nearest = np.abs(one.images - np.asarray(plain).transpose(2, 0, 1).astype(float)).mean(axis=(1, 2, 3)).min()
    assert nearest < 2


# ---- wrong sources ----


def test_a_wrong_path_or_an_empty_source_gets_one_sentence(opened, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no picture")
    (tmp_path / "file.zip").write_bytes(b"no zip")
    zip_of(tmp_path / "cut.zip", ["0.png"])
    (tmp_path / "cut.zip").write_bytes((tmp_path / "cut.zip").read_bytes().replace(b"PK\x01\x02", b"PK\x09\x09"))
    cases = {
        tmp_path / "nowhere": "neither a folder, zip or parquet file here nor a Hub id",
        tmp_path / "empty": "holds no pictures",
        tmp_path / "text": "holds no pictures",
        tmp_path / "file.zip": "neither a folder nor a zip",
        tmp_path / "cut.zip": "cut.zip is damaged",
        "": "neither a folder",
    }
    for source, words in cases.items():
        with pytest.raises(DataError, match=words) as failure:
            opened(source)
        assert str(failure.value).count("\n") == 0
    with pytest.raises(DataError, match="list of pictures is empty"):
        opened([])


def test_a_damaged_parquet_file_is_named_at_once(opened, tmp_path):
    good, bad = (tmp_path / "set" / f"train-0000{n}-of-00002.parquet" for n in range(2))
    good.parent.mkdir()
    good.write_bytes(parquet_bytes([numbered_png(row) for row in range(20)]))
    bad.write_bytes(good.read_bytes()[:2000])
    start = time.monotonic()
    with pytest.raises(DataError, match=f"Shard {bad.name} of .* 1 of 2 shards are missing"):
        opened(good.parent).wait()
    assert time.monotonic() - start < 30, "a local file was waited for"


# ---- dropped rows ----


def test_too_many_bad_rows_stop_with_counts_and_three_examples(opened, tmp_path):
    folder = folder_of(tmp_path / "pictures", 46)
    for index in range(2):
        (folder / f"page{index}.jpg").write_bytes(b"<html>")
        (folder / f"pixel{index}.png").write_bytes(numbered_png(0, side=1))
    cache = opened(folder)
    with pytest.raises(DataError) as failure:
        cache.wait()
    said = str(failure.value)
    assert "4 of the first 50 rows" in said
    assert "2 not a picture" in said
    assert "2 too small" in said
    assert sum(said.count(name) for name in ("page0.jpg", "page1.jpg", "pixel0.png", "pixel1.png")) == 3
    assert "max_bad=0.08" in said
    assert len(cache.images) == 46

    allowed = opened(folder, max_bad=0.08).wait()
    assert sorted(numbers(allowed.images)) == list(range(46))
    assert allowed.report["dropped"] == {"not a picture": 2, "too small": 2}
    assert "2 not a picture, 2 too small" in repr(allowed.report)


def test_a_few_bad_rows_do_not_stop(opened, tmp_path):
    folder = folder_of(tmp_path / "pictures", 60)
    (folder / "page.jpg").write_bytes(b"<html>")
    cache = opened(folder).wait()
    assert len(cache) == 60
    assert cache.report["dropped"] == {"not a picture": 1}


def test_an_unreadable_file_is_a_dropped_row(opened, tmp_path):
    folder = folder_of(tmp_path / "pictures", 60)
    (folder / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    cache = opened(folder).wait()
    assert len(cache) == 60
    assert cache.report["dropped"] == {"unreadable": 1}


# ---- the cache as a whole ----


def test_another_size_seed_or_content_is_another_cache(opened, tmp_path):
    folder = folder_of(tmp_path / "pictures", 20)
    first = opened(folder).wait()
    assert opened(folder).complete
    larger = opened(folder, image_size=24).wait()
    assert larger.images.shape == (20, 3, 24, 24)
    other = opened(folder, seed=1).wait()
    assert numbers(other.images) != numbers(first.images)
    folder_of(folder, 1, first=20)
    assert sorted(numbers(opened(folder).wait().images)) == list(range(21))
    (folder / "even" / "0000.png").write_bytes(numbered_png(30))
    assert 30 in numbers(opened(folder).wait().images)


def test_max_images_takes_a_fair_sample(opened, tmp_path):
    folder = folder_of(tmp_path / "pictures", 60)
    some = opened(folder, max_images=20).wait()
    assert len(some) == some.report["seen"] == 20
    assert some.complete
    whole = opened(folder).wait()
    assert numbers(some.images) == numbers(whole.images)[:20]
    assert 0 < sum(number % 2 for number in numbers(some.images)) < 20, "one class only"


def test_a_finished_cache_opens_in_under_a_second(opened, tmp_path):
    folder = folder_of(tmp_path / "pictures", 500, side=16)
    opened(folder).wait().close()
    start = time.perf_counter()
    assert opened(folder).complete
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("spoil", ["images.u8", "state.json"])
def test_a_cache_whose_files_were_spoilt_is_filled_anew(opened, tmp_path, spoil):
    folder = folder_of(tmp_path / "pictures", 20)
    cache = opened(folder).wait()
    before = np.array(cache.images)
    cache.close()
    with open(cache.folder / spoil, "r+b") as file:
        file.truncate(100)
    again = opened(folder)
    assert not again.complete
    np.testing.assert_array_equal(again.wait().images, before)


def test_wait_returns_early_and_the_cache_goes_on_growing(opened, tmp_path):
    cache = opened(folder_of(tmp_path / "pictures", 300, side=600)).wait(20)
    assert len(cache) >= 20
    assert cache.batch(8).shape == (8, 3, 16, 16)
    assert len(cache.wait()) == 300
    assert len(cache.wait(10_000)) == 300


def test_wait_shows_the_rate(opened, tmp_path, capsys):
    opened(folder_of(tmp_path / "pictures", 30)).wait()
    assert "img/s" in capsys.readouterr().err


def test_a_batch_before_the_first_row_or_after_close_says_what_to_do(opened, tmp_path):
    cache = opened(folder_of(tmp_path / "pictures", 300, side=600))
    cache.close()
    if not len(cache):
        with pytest.raises(DataError, match="call cache.wait"):
            cache.batch(4)
    with pytest.raises(DataError, match="closed"):
        cache.wait()


def test_it_is_a_context_manager_and_closing_stops_the_filler(tmp_path):
    folder = folder_of(tmp_path / "pictures", 300, side=600)
    with open_images(folder, 16, cache_dir=tmp_path / "cache") as cache:
        process = cache._process
    assert process.poll() is not None
    assert len(open_images(folder, 16, cache_dir=tmp_path / "cache").wait()) == 300


def test_a_plain_script_needs_no_main_guard(tmp_path):
    folder = folder_of(tmp_path / "pictures", 12)
    script = (
        f"from ld_data import *\nprint(len(open_images({str(folder)!r}, 16, cache_dir={str(tmp_path / 'c')!r}).wait()))"
    )
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "12", done.stderr


def test_a_full_disk_is_a_clear_error_and_the_cache_stays_readable(opened, tmp_path):
    """The second filler goes on from row 40 and inherits a limit on the size of files: the kernel refuses its writes."""
    folder = folder_of(tmp_path / "pictures", 300)
    before = opened(folder).wait()
    before.close()
    kept, state = numbers(before.images)[:40], before.folder / "state.json"
    stopped_at_40 = dict(rows=40, seen=40, shard=0, offset=40, complete=False)
    state.write_text(json.dumps({**json.loads(state.read_text()), **stopped_at_40}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((len(kept) + 2) * 3 * 16 * 16 + 100, limits[1]))
    try:
        cache = opened(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(DataError, match=f"The disk is full: .* no more than {len(kept)} rows; free some space"):
        cache.wait()
    assert numbers(cache.images) == kept
    whole = opened(folder).wait()
    assert numbers(whole.images)[: len(kept)] == kept
    assert sorted(numbers(whole.images)) == list(range(300))


def test_a_filler_killed_between_its_last_row_and_its_last_word_adds_none(opened, tmp_path):
    folder = folder_of(tmp_path / "pictures", 60)
    cache = opened(folder, max_images=20).wait()
    cache.close()
    state = cache.folder / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "complete": False, "shard": 0, "offset": 20}))
    again = opened(folder, max_images=20).wait()
    assert again.complete
    assert len(again) == 20


# ---- batches ----


def test_a_batch_is_uint8_on_the_cpu_pinned_if_there_is_a_gpu(opened, tmp_path):
    batch = opened(folder_of(tmp_path / "pictures", 10)).wait().batch(64)
    assert batch.dtype == torch.uint8
    assert batch.shape == (64, 3, 16, 16)
    assert batch.device.type == "cpu"
    assert batch.is_pinned() == torch.cuda.is_available()


def test_every_row_is_drawn_about_equally_often(opened, tmp_path):
    cache = opened(folder_of(tmp_path / "pictures", 10)).wait()
    drawn = np.bincount(numbers(cache.batch(10_000, generator=torch.Generator().manual_seed(0)).numpy()), minlength=10)
    assert drawn.sum() == 10_000
    assert (abs(drawn - 1000) < 150).all()  # five standard deviations


def batches(cache, generator, count=5):
    return [numbers(cache.batch(8, generator=generator).numpy()) for _ in range(count)]


def test_the_order_is_the_same_for_the_same_seed_whatever_the_fillers_speed(opened, tmp_path):
    folder = folder_of(tmp_path / "pictures", 60)
    quick = opened(folder).wait()
    slow = opened(folder, cache_dir=tmp_path / "slow")
    while not slow.complete:  # a filler that is stopped again and again
        slow._process.send_signal(signal.SIGSTOP)
        time.sleep(0.02)
        slow._process.send_signal(signal.SIGCONT)
        time.sleep(random.random() / 20)
    np.testing.assert_array_equal(slow.images, quick.images)
    expected = batches(quick, torch.Generator().manual_seed(7))
    assert batches(slow, torch.Generator().manual_seed(7)) == expected
    assert batches(quick, torch.Generator().manual_seed(8)) != expected


def test_a_restored_generator_goes_on_with_the_same_batches(opened, tmp_path):
    folder = folder_of(tmp_path / "pictures", 60)
    cache, generator = opened(folder).wait(), torch.Generator().manual_seed(7)
    batches(cache, generator)
    state = generator.get_state()
    expected = batches(cache, generator)
    resumed = torch.Generator()
    resumed.set_state(state)
    assert batches(opened(folder), resumed) == expected


def test_batches_are_what_the_generator_draws_whatever_was_gathered_ahead(opened, tmp_path):
    """While the cache grows, with changing batch sizes, two generators in turn, and one of them used for more."""
    cache = opened(folder_of(tmp_path / "pictures", 300, side=600)).wait(10)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    while not cache.complete:
        for step in range(60):
            generator = generators[step // 10 % 2]
            size, plain = (8, 4)[step // 30], generator.clone_state()
            before = len(cache)
            batch = cache.batch(size, generator=generator)
            if before == len(cache):  # else the draw may have been from more rows
                index = torch.randint(before, (size,), generator=plain)
                np.testing.assert_array_equal(batch.numpy(), cache.images[index.numpy()])
            if step % 7 == 0:
                torch.rand(3, generator=generator)


def test_without_a_generator_the_seed_decides(opened, tmp_path):
    folder = folder_of(tmp_path / "pictures", 60)
    assert batches(opened(folder).wait(), None) == batches(opened(folder), None)


def test_the_model_range(opened, tmp_path):
    batch = opened(folder_of(tmp_path / "pictures", 30)).wait().batch(16)
    plain = to_model_range(batch, "cpu", flip=False)
    torch.testing.assert_close(plain, from_uint8(batch))
    assert plain.dtype == torch.float32


def test_about_half_of_the_pictures_are_mirrored_each_as_a_whole():
    batch = torch.arange(2 * 3 * 4, dtype=torch.uint8).reshape(2, 3, 2, 2).repeat(500, 1, 1, 1)  # [1000, 3, 2, 2]
    out = to_model_range(batch, "cpu", generator=torch.Generator().manual_seed(0))
    same = (out == from_uint8(batch)).flatten(1).all(1)
    mirrored = (out == from_uint8(batch.flip(-1))).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 420 < mirrored.sum() < 580
    again = to_model_range(batch, "cpu", generator=torch.Generator().manual_seed(0))
    assert torch.equal(out, again)


# ---- more than one process ----


def test_two_processes_share_one_cache(opened, tmp_path):
    folder = folder_of(tmp_path / "pictures", 200, side=400)
    caches = [opened(folder) for _ in range(3)]
    threads = [threading.Thread(target=cache.wait) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = numbers(caches[0].images)
    assert sorted(order) == list(range(200))
    assert all(numbers(cache.images) == order for cache in caches)
    assert os.path.getsize(caches[0].folder / "images.u8") == 200 * 3 * 16 * 16


def test_the_second_takes_over_when_the_first_filler_dies(opened, tmp_path):
    folder = folder_of(tmp_path / "pictures", 300, side=600)
    first = opened(folder).wait(20)
    second = opened(folder)
    assert len(second) >= 20, "the second does not see what the first has filled"
    first.close()
    assert sorted(numbers(second.wait().images)) == list(range(300))
