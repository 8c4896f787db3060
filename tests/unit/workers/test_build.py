"""Workers of each role out of one checkpoint: together they give what one worker alone gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cluster.control.topology import LOAD_SHARE
from cluster.errors import CheckpointError, ConfigError
from cluster.protocol import Launch, Likeness, Peer, Role, Sampling, Stopping, Submit
from tests.support.checkpoints import CONFIG, random_tensors, write
from tests.support.experts import make_route, serve_in_thread
from tests.support.numerics import KERNELS_DIR
from tests.support.tokenizers_ import build
from workers.build import WEIGHTS_SHARE, build_engine, build_expert_host
from workers.engine import Engine
from workers.experts.backend import LocalExperts
from workers.experts.exchange import PeerLink
from workers.experts.host import ExpertHost
from workers.models.weights import MoEWeights

MIXED = {**CONFIG, "vocab_size": 500, "num_hidden_layers": 3, "mlp_only_layers": [1], "intermediate_size": 40}
DENSE = {
    **{key: value for key, value in CONFIG.items() if "expert" not in key and not key.startswith("moe")},
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 500,
    "intermediate_size": 40,
}
KINDS = [
    pytest.param(str(KERNELS_DIR), marks=pytest.mark.needs("compiler"), id="native"),
    pytest.param(None, id="torch"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(build("byte_level", tmp_path_factory.mktemp("moe")), MIXED, random_tensors(MIXED))


def make_launch(path: Path, role: Role, **fields: object) -> Launch:
    launch = Launch(address="", model_path=str(path), served_name="m", device="cpu", page_size=16, role=role)
    return msgspec.structs.replace(launch, **fields)


def tokens_of(engine: Engine) -> list[int]:
    submit = Submit(
        request_id="x",
        prompt_ids=tuple(range(10, 40)),
        sampling=Sampling(seed=1),
        stopping=Stopping(max_tokens=20, ignore_eos=True),
    )
    engine.submit(engine.request_from(submit))
    found: list[int] = []
    while engine.has_work:
        outputs = engine.step().outputs
        assert not engine.stalled
        assert all(output.finish is None or output.finish.reason == "length" for output in outputs)
        found += [token for output in outputs for token in output.token_ids]
    return found


@pytest.mark.parametrize("kernels_dir", KINDS)
def test_attention_and_experts_apart_give_the_tokens_of_one_worker(checkpoint: Path, kernels_dir: str | None) -> None:
    whole = build_engine(make_launch(checkpoint, "all", kernels_dir=kernels_dir))
    assert whole.experts is None
    assert isinstance(whole.engine.decoder.experts, LocalExperts)
    held = {"a": (0, 3), "b": (1, 2)}
    hosts: dict[str, ExpertHost] = {}
    for name, ids in held.items():
        built = build_expert_host(make_launch(checkpoint, "expert", kernels_dir=kernels_dir))
        assert built.likeness == whole.likeness
        hosts[name] = built.host
        assert hosts[name].experts == ((), (), ())
        hosts[name].assign((ids, (), ids))

    def link_opener(likeness: Likeness) -> Callable[[Peer], PeerLink]:
        assert likeness == whole.likeness
        return lambda peer: serve_in_thread(hosts[peer.worker_id])

    apart = build_engine(make_launch(checkpoint, "attention", kernels_dir=kernels_dir), link_opener=link_opener)
    changes: list[bool] = []
    apart.experts_changed.listen(lambda: changes.append(apart.experts is not None and apart.experts.ready))
    experts = apart.experts
    assert experts is not None
    assert apart.engine.decoder.experts is experts
    assert apart.num_parameters == whole.num_parameters
    assert apart.engine.decoder.numerics.name == whole.engine.decoder.numerics.name
    assert apart.engine.decoder.numerics.row_block == whole.engine.decoder.numerics.row_block
    layers = [layer.mlp for layer in apart.engine.decoder.weights.layers if isinstance(layer.mlp, MoEWeights)]
    assert [mlp.experts for mlp in layers] == [None, None]
    assert not experts.ready
    experts.set_route(make_route(1, apart.engine.decoder.spec, held))
    assert experts.ready
    assert changes == [True]
    assert tokens_of(apart.engine) == tokens_of(whole.engine)
    experts.close()


def test_a_dense_model_needs_no_route(tmp_path: Path) -> None:
    path = write(build("byte_level", tmp_path), DENSE, random_tensors(DENSE))
    nobody = make_launch(path, "attention")
    apart = build_engine(nobody, link_opener=lambda _: lambda _: pytest.fail("nobody is to be reached"))
    assert apart.experts is not None
    assert apart.experts.ready
    assert tokens_of(apart.engine) == tokens_of(build_engine(make_launch(path, "all")).engine)
    with pytest.raises(ConfigError, match="dense model") as caught:
        build_expert_host(make_launch(path, "expert"))
    assert caught.value.param == "role"


def test_a_controller_knows_what_a_worker_would_refuse() -> None:
    assert LOAD_SHARE == WEIGHTS_SHARE


def test_an_expert_worker_takes_no_more_than_the_machine_has(checkpoint: Path) -> None:
    expert_bytes = 3 * 32 * 24 * 4
    launch = make_launch(checkpoint, "expert", host_memory_bytes=4 * expert_bytes)  # nine tenths of it
    host = build_expert_host(launch).host
    host.assign(((0, 1), (), (2,)))
    with pytest.raises(CheckpointError, match="are free on cpu"):
        host.assign(((0, 1, 2), (), (2,)))
    assert host.experts == ((0, 1), (), (2,))
