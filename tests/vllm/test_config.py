"""What is refused by name before anything is loaded, and where graphs are cut, with vLLM's own configs."""

# vLLM has an environment of its own.
# pyright: reportMissingImports=false

import importlib.util

import pytest
from transformers import AutoModelForCausalLM

from sae_transformers import SaeForCausalLM
from sae_transformers.vllm import cache_key, register
from sae_transformers.vllm.config import ARCHITECTURE, SaeModelConfig
from sae_transformers.vllm.wrapping import wrap
from tests.tiny import tiny_sae
from tests.vllm.worlds import published

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM has an environment of its own"),
    pytest.mark.filterwarnings("ignore"),
]


def vllm_config(folder, **options):
    from vllm.engine.arg_utils import EngineArgs

    asked = {"model": str(folder / "repository"), "skip_tokenizer_init": True, "dtype": "float32", **options}
    return EngineArgs(**asked).create_engine_config()


def test_graphs_are_cut_at_our_operator(tmp_path, monkeypatch):
    from vllm.config.compilation import CUDAGraphMode

    published(tmp_path)
    config = vllm_config(tmp_path)
    assert "sae_transformers::steer" in config.compilation_config.splitting_ops
    assert "vllm::unified_attention" in config.compilation_config.splitting_ops[0]
    assert config.additional_config["sae_transformers"]
    config.compilation_config.cudagraph_mode = None  # as on a GPU, where the default is to be chosen
    SaeModelConfig.verify_and_update_config(config)
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode.PIECEWISE
    assert config.compilation_config.splitting_ops.count("sae_transformers::steer") == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"compilation_config": {"cudagraph_mode": "FULL"}}, "a graph of the whole pass"),
        ({"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}, "cudagraph_mode=FULL_AND_PIECEWISE"),
        ({"enable_lora": True}, "LoRA beside SAEs"),
        ({"enable_dbo": True}, "micro-batches"),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "context parallel"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
    ],
)
def test_options_that_would_steer_wrongly(tmp_path, options, told):
    published(tmp_path)
    with pytest.raises(ValueError, match="Models with SAEs on vLLM do not support") as refused:
        vllm_config(tmp_path, **options)
    assert told in str(refused.value)


def test_a_site_that_tensor_parallelism_cuts(tmp_path):
    published(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    sae = tiny_sae(d_in=96, layer=1, site="mlp_act")
    SaeForCausalLM.from_base(base, [sae]).save_pretrained(tmp_path / "repository")
    assert vllm_config(tmp_path).parallel_config.tensor_parallel_size == 1
    with pytest.raises(ValueError, match="layers.1.mlp_act, tensor_parallel_size=2"):
        vllm_config(tmp_path, tensor_parallel_size=2)


def test_a_release_that_moved_a_name_says_so():
    with pytest.raises(ImportError, match=r"stands on vllm\.v1\.request\.Request\.gone, which vLLM 0\.32"):
        wrap("vllm.v1.request", "Request.gone", lambda original: None)
    with pytest.raises(ImportError, match=r"vllm\.v1\.gone"):
        wrap("vllm.v1.gone", "f", lambda original: None)


def test_our_models_are_refused_on_such_a_release_and_no_others(tmp_path, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    def moved():
        raise ImportError("Steering on vLLM stands on a name that is gone.")

    published(tmp_path)
    monkeypatch.setitem(MODELS_CONFIG_MAP, ARCHITECTURE, MODELS_CONFIG_MAP.get(ARCHITECTURE))
    monkeypatch.setattr(cache_key, "install", moved)
    register()
    with pytest.raises((ImportError, ValueError), match="a name that is gone"):
        vllm_config(tmp_path)
    plain = EngineArgs(model=str(tmp_path / "base"), skip_tokenizer_init=True, dtype="float32")
    assert plain.create_engine_config().model_config.architecture == "LlamaForCausalLM"


def test_registering_twice_wraps_once():
    from vllm.v1.engine.input_processor import InputProcessor

    register()
    first = InputProcessor.process_inputs
    register()
    assert InputProcessor.process_inputs is first
