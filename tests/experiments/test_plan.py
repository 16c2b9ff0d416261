"""The plan of a run: targets, what is not known without data, memory and communication, with and without compiling."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from diffusion import ledger
from experiments import costs, parts, plan, plan_program, plan_report, plan_targets
from experiments.bench.accelerator import program_text
from experiments.config import Config, Data
from experiments.configs import jit, smoke
from experiments.plan_targets import Target


def tiny(**train):
    config = smoke.get_config()
    config.model = dataclasses.replace(config.model, width=64, depth=1, patch_size=14)
    config.train = dataclasses.replace(config.train, **train)
    return config


def resolved(**train):
    config = tiny(**train)
    return parts.resolve(config, plan.data_spec(config))


@pytest.mark.parametrize(
    ("text", "target", "count"),
    [
        ("cpu:8", Target("cpu", (1, 8)), 8),
        ("v5e:4x4", Target("v5e", (4, 4)), 16),
        ("v5p:4x4x4", Target("v5p", (4, 4, 4)), 64),
        ("h100:1", Target("h100", (1, 1)), 1),
        ("h100:4x8", Target("h100", (4, 8)), 32),
    ],
)
def test_targets_are_read_as_they_are_written(text, target, count):
    assert plan_targets.parse(text) == target and target.count == count and str(target) == text


@pytest.mark.parametrize("text", ["abacus:8", "v5e", "v5e:16", "h100:2x2x2", "cpu:0", "cpu:-1", "v5p:4xx4"])
def test_other_targets_are_refused_with_those_that_are_known(text):
    with pytest.raises(ValueError, match=rf"--target={text}: .*cpu:8, v5e:4x4, v5p:4x4x4, v6e:8x8, h100:1"):
        plan_targets.parse(text)


def test_slow_links_between_hosts_are_those_that_count():
    one, four = (plan_targets.parse(text).bandwidth for text in ("h100:8", "h100:4x8"))
    assert one == 450e9 and four == 50e9


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plan_targets.missing(plan_targets.parse("v5e:2x2")) == "libtpu"
    assert plan_targets.missing(plan_targets.parse("h100:1")).startswith("jax-cuda12-plugin[with-cuda]==")
    assert plan_targets.missing(plan_targets.parse("cpu:8")) is None


def test_attention_that_cannot_be_traced_is_refused(monkeypatch):
    config = tiny()
    config.model.attention = "cudnn"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jax-cuda12-plugin.*pass --config.model.attention=xla"):
        plan.check_attention(config)
    config.model.attention = "xla"
    plan.check_attention(config)


def test_an_environment_is_set_once(monkeypatch):
    """Else the command would restart for ever."""
    for text in ("cpu:8", "v5e:2x2", "h100:1"):
        target = plan_targets.parse(text)
        wanted = plan_targets.environment(target)
        for name, value in wanted.items():
            monkeypatch.setenv(name, value)
        assert plan_targets.environment(target) == wanted


def test_shape_and_classes_come_from_the_config_or_from_flags():
    assert plan.data_spec(jit.get_config("b32"))[:1] == ((512, 512, 3),)
    assert plan.data_spec(jit.get_config()).num_classes == 1000
    assert plan.data_spec(smoke.get_config())[:2] == ((28, 28, 1), tuple(map(str, range(10))))
    config = Config(data=Data(name="folder:elsewhere"))
    assert plan.data_spec(config, ["64", "32"], 7)[0] == (64, 32, 3)
    with pytest.raises(ValueError, match="--image_size=HEIGHT,WIDTH"):
        plan.data_spec(config, None, 7)
    with pytest.raises(ValueError, match="--num_classes=N"):
        plan.data_spec(config, ["64", "64"])
    with pytest.raises(ValueError, match="must be numbers"):
        plan.data_spec(config, ["64px", "64"])
    config.data.labels = False
    assert plan.data_spec(config, ["64", "64"]).num_classes == 0


@pytest.mark.parametrize(("data", "fsdp"), [(None, 3), (4, 4), (None, 0)])
def test_a_mesh_must_have_all_devices(data, fsdp):
    with pytest.raises(ValueError, match=f"fsdp={fsdp} must .*8"):
        plan_program.mesh_of(data, fsdp, 8)


def test_a_state_is_split_and_a_batch_too():
    run = resolved()
    one, four = (plan_program.shapes(run, 16, plan_program.mesh_of(None, fsdp, 8)) for fsdp in (1, 4))
    whole, split = plan_program.state_bytes(one), plan_program.state_bytes(four)
    values = ledger.total(costs.of_network(run)).parameters
    assert whole["parameters"] == whole["averages"] == 4 * values and whole["optimiser"] >= 2 * 4 * values
    assert whole["batch"] == split["batch"] == 2 * (28 * 28 + 4)
    for name in ("parameters", "averages", "optimiser"):
        assert whole[name] / 4 <= split[name] < whole[name] / 3
    with pytest.raises(ValueError, match="--batch_size=12 must be a multiple of 8 devices"):
        plan_program.shapes(run, 12, plan_program.mesh_of(None, 1, 8))


@pytest.mark.parametrize("fits_up_to", [0, 1, 3, 64, 1000])
@pytest.mark.parametrize("start", [1, 64])
def test_the_largest_power_of_two_is_found_from_anywhere(fits_up_to, start):
    found = plan_program.largest_power(lambda n: n <= fits_up_to, start)
    assert found <= fits_up_to < 2 * found or found == fits_up_to == 0


def test_the_plan_without_a_compiler():
    run = resolved()
    result = plan.plan(run, plan_targets.parse("v5e:4x4"), 64, fsdp=4) | {"config": "smoke", "not_compiled": "so"}
    assert json.loads(json.dumps(result)) == result
    cost = ledger.total(costs.of_network(run))
    assert result["flops"] == 3 * 64 * cost.flops and result["fits"]
    # Four images on each device, and a gradient for each of its parameters.
    assert result["temporary_bytes"] == 4 * cost.kept + result["state_bytes"]["parameters"]
    for row in result["speed"]:
        assert row["seconds"] * row["utilisation"] * 16 * 197e12 == pytest.approx(result["flops"])
        assert row["images_per_second"] * row["seconds"] == pytest.approx(64)
    text = plan_report.report(result)
    assert "estimated from the ledger (so)" in text and "40%" in text and "  fits in 16.0 of the 16.0 GiB" in text
    assert f"largest power of two that fits, estimated: {result['largest']} images a device" in text


def test_the_largest_batch_is_the_largest_that_fits():
    run, target = resolved(), plan_targets.parse("v5e:2x2")
    mesh, kept = plan_program.mesh_of(None, 1, 4), ledger.total(costs.of_network(run)).kept
    state = sum(plan.plan(run, target, 4)["state_bytes"].values())
    room = state + 2 * state + 20 * kept
    found = plan.largest_batch(run, mesh, room, kept, known=False)
    for each, fits in ((found, True), (2 * found, False)):
        given = plan_program.shapes(run, 4 * each, mesh)
        needed = sum(plan_program.state_bytes(given).values()) + plan_program.estimated(given, kept, each)
        assert (needed <= room) == fits
    # Where the compiler is asked, it decides.
    assert plan.largest_batch(run, mesh, room, kept, known=False, fits=lambda b: b <= 4 * 2) == 2


def test_parts_of_a_batch_need_the_memory_of_a_part():
    whole, part = (plan.plan(resolved(microbatch=m), plan_targets.parse("v5e:2x2"), 64) for m in (None, 16))
    gradients = whole["state_bytes"]["parameters"]
    assert whole["temporary_bytes"] - gradients == 4 * (part["temporary_bytes"] - gradients)
    assert whole["flops"] == part["flops"]


def test_what_a_compiler_refuses_does_not_fit(monkeypatch):
    def refuse(run, given):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nmore")

    monkeypatch.setattr(plan_program, "compiled", refuse)
    monkeypatch.setattr(plan_targets, "devices", lambda target: None)
    result = plan.plan(resolved(), plan_targets.parse("v5e:2x2"), 16, compiles=True)
    assert result["fits"] is False and result["refused"].endswith("memory space hbm.")
    text = plan_report.report(result | {"config": "smoke", "not_compiled": None})
    assert "DOES NOT FIT" in text and "the compiler: RESOURCE_EXHAUSTED: Ran out of memory" in text

    monkeypatch.setattr(plan_program, "compiled", lambda run, given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan.plan(resolved(), plan_targets.parse("v5e:2x2"), 16, compiles=True)


def test_the_table_has_every_network_and_number_of_devices(monkeypatch):
    small = jit.get_config("b16")
    small.model = dataclasses.replace(small.model, width=256, depth=1, heads=2, class_tokens_from=0)
    monkeypatch.setattr(plan.jit, "get_config", lambda variant: small)
    rows = plan.table(plan_targets.parse("h100:1"), ("b16", "l32"))
    assert [row["network"] for row in rows] == ["JiT-B/16", "JiT-L/32"]
    row = rows[0]
    assert row["state_1"] > row["state_8"] > row["state_256"] > row["state_1"] / 256
    assert row["images_per_second_256"] == pytest.approx(256 * 0.4 * 989e12 / (3 * row["flops"]))
    assert plan_report.table(rows).count("\n") == 3


COLLECTIVES = """HloModule jit_f, num_partitions=8

%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body.1 (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry = (s32[], f32[8]{0}) parameter(0)
  %x.1 = f32[8]{0} get-tuple-element(%carry), index=1
  %g.1 = f32[32]{0} all-gather(%x.1), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %out.1 = (s32[], f32[8]{0}) tuple(%x.1, %g.1)
}

%begin (n.1: f32[8]) -> f32[32] {
  %n.1 = f32[8]{0} parameter(0)
  ROOT %g.2 = f32[32]{0} all-gather(%n.1), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%end (n.2: f32[8]) -> f32[32] {
  %n.2 = f32[8]{0} parameter(0)
  ROOT %g.3 = f32[32]{0} all-gather(%n.2), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%all-reduce-scatter.1 (n.3: f32[16]) -> f32[8] {
  %n.3 = f32[16]{0} parameter(0)
  %r.3 = f32[16]{0} all-reduce(%n.3), channel_id=4, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%region_0.1
  ROOT %d.3 = f32[8]{0} dynamic-slice(%r.3, %n.3), dynamic_slice_sizes={8}
}

%taken (t.1: f32[16]) -> f32[16] {
  %t.1 = f32[16]{0} parameter(0)
  ROOT %s.1 = f32[4]{0} reduce-scatter(%t.1), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%region_0.1
}

%left (t.2: f32[16]) -> f32[16] {
  ROOT %t.2 = f32[16]{0} parameter(0)
}

ENTRY %main.1 (a.1: f32[16]) -> f32[16] {
  %a.1 = f32[16]{0} parameter(0)
  %b.1 = (s32[], f32[8]{0}) tuple()
  %w.1 = (s32[], f32[8]{0}) while(%b.1), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %f.1 = f32[32]{0} fusion(%a.1), kind=kCustom, calls=%begin
  %f.2 = f32[32]{0} fusion(%f.1), kind=kCustom, calls=%end
  %f.3 = f32[8]{0} fusion(%a.1), kind=kCustom, calls=%all-reduce-scatter.1
  %r.1 = f32[16]{0} all-reduce-start(%a.1), replica_groups={}, to_apply=%region_0.1
  %r.2 = f32[16]{0} all-reduce-done(%r.1)
  %m.1 = f32[16]{0} all-to-all(%a.1), replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x','y':(1)2}
  %p.1 = f32[16]{0} collective-permute(%r.2), source_target_pairs={{0,1},{1,0}}
  ROOT %c.1 = f32[16]{0} conditional(%i, %a.1, %a.1), branch_computations={%taken, %left}
}
"""


def test_communication_is_read_from_the_text_of_a_program():
    assert program_text.collectives(COLLECTIVES) == {
        "all-gather": {"count": 6, "bytes": 6 * 4 * 32, "sent": 6 * 3 * 32},  # one with two fusions, one five times
        "all-reduce": {"count": 1, "bytes": 64, "sent": 2 * 64 * 7 // 8},
        "all-to-all": {"count": 1, "bytes": 64, "sent": 48},
        "collective-permute": {"count": 1, "bytes": 64, "sent": 64},
        "reduce-scatter": {"count": 2, "bytes": 2 * 64, "sent": 48 + 32},
    }


PROGRAM = """
import json, jax, jax.numpy as jnp
from diffusion import sharding
from experiments.bench.accelerator import program_text

mesh = sharding.make_mesh(2, 4)
def place(*axes):
    return jax.sharding.NamedSharding(mesh, jax.P(*axes))
def loss(w, x):
    return jnp.square(jax.lax.with_sharding_constraint(w, place()) * x.sum()).sum()
args = (jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=place("fsdp")),
        jax.ShapeDtypeStruct((16,), jnp.float32, sharding=place(("data", "fsdp"))))
compiled = jax.jit(jax.grad(loss), out_shardings=place("fsdp")).lower(*args).compile()
print(json.dumps(program_text.collectives(compiled.as_text())))
"""


def on_eight_devices(*command):
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8", "NPROC": "16"}
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | flags | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_communication_of_a_program_for_eight_devices():
    """A matrix over four of them is gathered, and the sum of the batch crosses all eight."""
    found = on_eight_devices("-c", PROGRAM)
    assert found["all-gather"] == {"count": 1, "bytes": 4 * 64 * 32, "sent": 4 * 64 * 32 * 3 // 4}
    assert found["all-reduce"]["count"] == 1 and found["all-reduce"]["bytes"] == 4


@pytest.mark.slow
def test_the_command_compiles_for_eight_devices():
    given = ["--config=experiments/configs/smoke.py", "--target=cpu:8", "--config.mesh.fsdp=4", "--json"]
    result = on_eight_devices("-m", "experiments.plan", *given, "--config.model.width=128", "--config.model.depth=1")
    found, held = result["compiled"], sum(result["state_bytes"].values())
    assert result["mesh"] == {"data": 2, "fsdp": 4} and not result["fits"] and result["memory"] is None
    # Beside state and batch there is a key. The state is written where it was.
    assert 0 <= found["arguments"] - held <= 64 and found["alias"] > 0.9 * (held - result["state_bytes"]["batch"])
    assert result["bytes"] == found["arguments"] + found["outputs"] - found["alias"] + found["temporary"]
    # Of the split matrices those that see one vector an image need not be gathered; every gradient is summed.
    whole = 4 * result["ledger"][-1]["cost"]["parameters"]
    assert whole / 2 < found["collectives"]["all-gather"]["bytes"] < 3 * whole
    assert whole / 4 < sum(row["bytes"] for name, row in found["collectives"].items() if "reduce" in name) < 3 * whole
    assert 0.8 < result["flops"] / (8 * found["flops"]) < 1.1
    text = plan_report.report(result)
    assert "all-gather" in text and "temporary, compiled in" in text and "of the peak" not in text
    assert np.isfinite(found["seconds"])
