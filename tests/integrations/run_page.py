"""Run the code of a page of docs/stacks on the CPU, with what the page takes as given.

Argument: the name of the page.
"""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.update(
    HF_HUB_OFFLINE="1",
    DS_ACCELERATOR="cpu",
    DS_IGNORE_CUDA_DETECTION="1",
    ACCELERATE_USE_CPU="true",
    CUDA_VISIBLE_DEVICES="",
    TRL_EXPERIMENTAL_SILENCE="1",
    RANK="0",
    LOCAL_RANK="0",
    WORLD_SIZE="1",
    MASTER_ADDR="127.0.0.1",
)

import torch
from torch import nn

PAGES = Path(__file__).resolve().parents[2] / "docs" / "stacks"


def code_of(page):
    """Return the blocks of Python, those in lists too."""
    text = (PAGES / f"{page}.md").read_text()
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", text, re.M | re.S)
    return "\n".join(
        "\n".join(line[len(indent) :] for line in block.splitlines()) for indent, block in blocks
    )


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


BATCHES = [torch.randn(16, 8, generator=torch.Generator().manual_seed(t)) for t in range(20)]


def loss_of(model, batch):
    return (model(batch) - batch[:, :1]).square().mean()


def language_model():
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    more = {"num_attention_heads": 2, "max_position_embeddings": 16, "vocab_size": 16}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more))


ROWS = [
    {"input_ids": torch.arange(8) + i % 8, "labels": torch.arange(8) + i % 8} for i in range(32)
]


def briefly():
    """Let TrainingArguments train a few steps on the CPU, without a report."""
    import transformers

    plain = transformers.TrainingArguments.__init__
    few = {"max_steps": 3, "use_cpu": True, "report_to": [], "disable_tqdm": True}

    def made(self, *args, **options):
        plain(self, *args, **{**options, **few, "warmup_steps": 1, "logging_steps": 1})

    transformers.TrainingArguments.__init__ = made


def group():
    torch.distributed.init_process_group("gloo")


def ddp():
    group()
    names = {"model": network(), "batches": BATCHES, "loss_of": loss_of}
    return names, lambda made: [made["opt"]]


def trainer():
    briefly()

    def end(made):
        for name in ("trainer", "muon_trainer"):
            made[name].train()
        assert "effective_lr" in made["trainer"].state.log_history[-2]
        assert made["trainer"].optimizer.optimizer.scale_source == "loss"
        return [made["trainer"].optimizer, made["muon_trainer"].optimizer]

    return {"model": language_model(), "data": ROWS}, end


def trl():
    import datasets
    from integrations.test_trl import tokenizer
    from trl import SFTConfig

    plain = SFTConfig.__init__
    few = {"max_steps": 3, "use_cpu": True, "report_to": [], "disable_tqdm": True, "bf16": False}

    def made(self, *args, **options):
        plain(self, *args, **{**options, **few, "max_length": 16, "gradient_checkpointing": False})

    SFTConfig.__init__ = made
    rows = [" ".join(f"w{2 + (i + j) % 14}" for j in range(8)) for i in range(32)]
    data = datasets.Dataset.from_dict({"text": rows})
    names = {"model": language_model(), "data": data, "tokenizer": tokenizer()}

    def end(made):
        made["trainer"].train()
        return [made["trainer"].optimizer]

    return names, end


def accelerate():
    from accelerate import Accelerator

    loader = torch.utils.data.DataLoader(torch.cat(BATCHES), 16)
    names = {"accelerator": Accelerator(cpu=True), "model": network(), "loader": loader}
    return {**names, "loss_of": loss_of}, lambda made: [made["opt"]]


def lightning():
    loader = torch.utils.data.DataLoader(torch.cat(BATCHES), 16)
    names = {"model": network(), "loader": loader, "loss_of": loss_of}
    return names, lambda made: made["trainer"].optimizers


def torchtitan():
    def end(made):
        model = network()
        built = made["optimizer"].build(model_parts=[model])
        mesh = SimpleNamespace(get_group=lambda: torch.distributed.group.WORLD)
        dims = SimpleNamespace(get_mesh={"pp": mesh}.get)
        made["name_stages"](SimpleNamespace(parallel_dims=dims, optimizers=built))
        for batch in BATCHES:
            loss_of(model, batch).backward()
            built.step()
            built.zero_grad()
        assert made["metrics"].log_freq == 10
        return built.optimizers

    group()
    return {}, end


def deepspeed():
    import deepspeed as engines

    engines.init_distributed(dist_backend="gloo")
    briefly()
    plain = engines.initialize

    def initialize(**options):
        config = options.get("config")
        if isinstance(config, dict):
            config["steps_per_print"] = 10**9
        return plain(**options)

    engines.initialize = initialize
    model = network()
    plain_save = engines.DeepSpeedEngine.save_checkpoint

    def save(engine, *where, **named):
        # The page trains before it saves; the next run loads into a new engine.
        for batch in BATCHES:
            engine.backward(loss_of(engine, batch))
            engine.step()
        return plain_save(engine, *where, **named)

    engines.DeepSpeedEngine.save_checkpoint = save
    from mechanic_fused import MechanicAdamW

    following = network()
    group_of_ranks = torch.distributed.group.WORLD
    next_engine, *_ = plain(
        model=following,
        optimizer=MechanicAdamW(following.parameters(), lr=1.0, reduce_group=group_of_ranks),
        config={
            "train_micro_batch_size_per_gpu": 16,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3},
            "checkpoint": {"load_universal": True},
        },
    )
    zero = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": "auto"}
    names = {"model": model, "groups": list(model.parameters()), "next_engine": next_engine}
    names |= {"zero": zero, "network": language_model(), "data": ROWS}

    def end(made):
        assert torch.equal(made["next_engine"].optimizer.optimizer.scale, made["opt"].scale)
        made["trainer"].train()
        return [made["opt"], made["trainer"].optimizer]

    return names, end


def timm():
    from integrations import timm_by_name

    def end(made):
        stepped(made["model"], made["opt"], made["muon"])
        return [made["opt"], made["muon"]]

    return {"model": timm_by_name.network()}, end


def stepped(model, *optimizers):
    for batch in BATCHES:
        for opt in optimizers:
            opt.zero_grad()
            loss_of(model, batch).backward()
            opt.step()


def llama_factory():
    import yaml

    def end(made):
        from mechanic_fused.integrations import llamafactory_plugin

        model = network()
        [text] = re.findall(r"```yaml\n(.*?)```", (PAGES / "llama-factory.md").read_text(), re.S)
        config = yaml.safe_load(text)["optim_config"]
        opt = llamafactory_plugin()(config["name"])(model, config)
        stepped(model, opt)
        return [opt]

    return {}, end


def logs():
    from mechanic_fused import MechanicAdamW

    model = network()
    opt = MechanicAdamW(model.parameters(), lr=1.0)
    names = {"model": model, "opt": opt, "batches": BATCHES, "loss_of": loss_of}
    return names, lambda made: [made["opt"]]


def overview():
    from mechanic_fused import MechanicAdamW

    model = network()
    opt = MechanicAdamW(model.parameters(), lr=1.0, variant="optax")
    stepped(model, opt)
    averaged = [p.detach() * 0.9 for p in model.parameters()]
    return {"model": model, "opt": opt, "averaged": averaged}, lambda made: [made["opt"]]


def main():
    from mechanic_fused.integrations import unwrapped

    page = sys.argv[1]
    torch.set_num_threads(1)
    prepare = {"README": overview, "llama-factory": llama_factory}.get(page)
    names, end = (prepare or globals()[page])()
    names["__name__"] = "page"
    exec(compile(code_of(page), page, "exec"), names)
    found = [opt for wrapper in end(names) for opt in unwrapped(wrapper)]
    assert found and all(bool((opt.scale > 0).all()) for opt in found), found
    print("RESULT", len(found))


if __name__ == "__main__":
    main()
