"""The order contract: batch k is a function of (seed, salt, k), and of nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import number_of, write_dataset

from dip_jax import config
from dip_jax.data import order, pipeline
from dip_jax.errors import UserError

COUNT = 23

# In Grain's threads, which may outlive an example, beartype draws which item of a list it checks; Hypothesis watches `random`.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("order") / "data", COUNT)


def read(dataset, *, steps, batch_size, seed=0, start_step=0, rows=None, salt=0, offset=0, **data):
    """Numbers of the images in these rows of the batches from start_step on: [steps, rows]."""
    section = config.Data(batch_size=batch_size, num_threads=data.pop("num_threads", 2), **data)
    rows = range(batch_size) if rows is None else rows
    order_of = {"seed": seed, "salt": salt, "offset": offset}
    stream = iter(pipeline.host_batches(dataset, section, rows=rows, start_step=start_step, **order_of))
    numbers = []
    try:
        for _ in range(steps):
            batch = next(stream)
            numbers.append([number_of(image) for image in batch["image"]])
            assert [n % dataset.num_classes for n in numbers[-1]] == list(batch["label"])
    finally:
        stream.close()
    return np.array(numbers)


sizes = st.integers(1, 12)
seeds = st.integers(0, 2**32)


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 500), seed=seeds, salt=st.integers(0, 3), epoch=st.integers(0, 1000))
def test_each_epoch_is_a_permutation(count, seed, salt, epoch):
    positions = range(epoch * count, (epoch + 1) * count)
    assert sorted(order.record_at(positions, num_records=count, seed=seed, salt=salt)) == list(range(count))


def test_epochs_seeds_and_salts_differ():
    orders = {
        (seed, salt, epoch): tuple(order.record_at(range(epoch * 50, epoch * 50 + 50), num_records=50, seed=seed, salt=salt))
        for seed in range(3)
        for salt in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 27


def test_shuffling_leaves_no_trace_of_the_old_order():
    count = 20_000
    records = np.array(order.record_at(range(count), num_records=count, seed=1))
    assert abs(np.corrcoef(records, np.arange(count))[0, 1]) < 0.03
    assert abs(np.corrcoef(records[1:], records[:-1])[0, 1]) < 0.03
    firsts = [order.record_at([0], num_records=count, seed=seed)[0] for seed in range(2000)]
    assert abs(np.mean(firsts) / count - 0.5) < 0.03 and len(set(firsts)) > 1800


GOLDEN = [[233, 815, 962, 246, 407, 428, 821, 490], [900, 19, 155, 867, 831, 879, 432, 849]]


def test_the_order_is_this_one():
    """A golden: another order would silently break every run that resumes."""
    assert order.batch_indices(1000, batch_size=8, seed=0, step=0).tolist() == GOLDEN[0]
    assert order.batch_indices(1000, batch_size=8, seed=7, salt=1, step=1000).tolist() == GOLDEN[1]


@settings(deadline=None, max_examples=25)
@given(batch_size=sizes, seed=seeds, salt=st.integers(0, 2), start=st.integers(0, 40), steps=st.integers(1, 8))
def test_starting_at_a_step_is_running_to_it(dataset, batch_size, seed, salt, start, steps):
    resumed = read(dataset, steps=steps, batch_size=batch_size, seed=seed, salt=salt, start_step=start)
    expected = [order.batch_indices(COUNT, batch_size=batch_size, seed=seed, salt=salt, step=start + k) for k in range(steps)]
    np.testing.assert_array_equal(resumed, expected)


def test_running_on_through_epochs_is_the_stream(dataset):
    whole = read(dataset, steps=20, batch_size=7, seed=3)
    expected = order.record_at(range(140), num_records=COUNT, seed=3)
    assert whole.ravel().tolist() == expected
    np.testing.assert_array_equal(read(dataset, steps=11, batch_size=7, seed=3, start_step=9), whole[9:])


@settings(deadline=None, max_examples=15)
@given(seed=seeds, parts=st.sampled_from([1, 2, 4]), per_part=st.integers(1, 5), threads=st.integers(1, 5), flip=st.booleans())
def test_processes_concatenate_to_the_global_batch(dataset, seed, parts, per_part, threads, flip):
    batch_size = parts * per_part
    whole = read(dataset, steps=6, batch_size=batch_size, seed=seed, flip=False)
    pieces = [
        read(
            dataset,
            steps=6,
            batch_size=batch_size,
            seed=seed,
            rows=range(p * per_part, (p + 1) * per_part),
            num_threads=threads,
        )
        for p in range(parts)
    ]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)


@pytest.mark.parametrize("parts", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_worker_processes_change_nothing(dataset, parts):
    batch_size, whole = 8, None
    for workers in (0, 2):
        per_part = batch_size // parts
        pieces = [
            read(
                dataset,
                steps=7,
                batch_size=batch_size,
                seed=5,
                start_step=2,
                rows=range(p * per_part, (p + 1) * per_part),
                num_workers=workers,
                flip=False,
            )
            for p in range(parts)
        ]
        batches = np.concatenate(pieces, axis=1)
        whole = batches if whole is None else whole
        np.testing.assert_array_equal(batches, whole)


def test_flips_follow_the_seed_and_are_half(dataset):
    def mirrored(seed, rows, start_step=0):
        section = config.Data(batch_size=40, flip=True, num_threads=2)
        stream = iter(pipeline.host_batches(dataset, section, rows=rows, seed=seed, start_step=start_step))
        images = [next(stream)["image"] for _ in range(10)]
        stream.close()
        return np.array([[image[1, 0, 0] == 3 for image in batch] for batch in images])  # the gradient starts at its end

    flags = mirrored(0, range(40))
    assert 0.4 < flags.mean() < 0.6
    np.testing.assert_array_equal(mirrored(0, range(10, 20)), flags[:, 10:20])
    np.testing.assert_array_equal(mirrored(0, range(40), start_step=4)[:6], flags[4:])
    assert (mirrored(1, range(40)) != flags).mean() > 0.3


def test_another_identity_is_refused_with_both_values(dataset, tmp_path):
    saved = order.identity(dataset, seed=1, batch_size=32)
    order.check_identity(saved, order.identity(dataset, seed=1, batch_size=32))
    other = write_dataset(tmp_path / "other", COUNT, per_shard=8)
    changes = {
        "seed": order.identity(dataset, seed=2, batch_size=32),
        "fingerprint": order.identity(other, seed=1, batch_size=32),
        "salt": order.identity(dataset, seed=1, batch_size=32, salt=1),
    }
    for key, now in changes.items():
        with pytest.raises(UserError, match=f"{key}={saved[key]} .*{key}={now[key]}"):
            order.check_identity(saved, now)


@settings(deadline=None, max_examples=20)
@given(changes=st.lists(st.tuples(sizes, st.integers(0, 4)), min_size=1, max_size=4), seed=seeds)
def test_another_batch_size_goes_on_at_the_same_image(dataset, changes, seed):
    """Any sequence of batch sizes reads the one stream, image by image, and any later restart with the last size too."""
    found, saved, step = [], None, 0
    for batch_size, steps in changes:
        offset = order.find_offset(saved, step=step, batch_size=batch_size) if saved else 0
        found += read(dataset, steps=steps, batch_size=batch_size, seed=seed, start_step=step, offset=offset).ravel().tolist()
        step += steps
        saved = order.identity(dataset, seed=seed, batch_size=batch_size, offset=offset)
        assert order.find_offset(saved, step=step, batch_size=batch_size) == offset
    assert found == order.record_at(range(len(found)), num_records=COUNT, seed=seed)
    expected = order.batch_indices(COUNT, batch_size=batch_size, seed=seed, offset=offset, step=step)
    assert expected.tolist() == order.record_at(range(len(found), len(found) + batch_size), num_records=COUNT, seed=seed)


def test_a_checkpoint_that_knows_no_offset_began_at_zero():
    assert order.find_offset({"batch_size": 8}, step=5, batch_size=8) == 0
    assert order.find_offset({"batch_size": 8}, step=5, batch_size=16) == -40
