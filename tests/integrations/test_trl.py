"""TRL's SFTTrainer with an adapter of PEFT: only the adapter learns, and it resumes to the bit."""

import pytest
import torch
from support.cases import assert_same, differs
from support.stacks import import_stack

from mechanic_fused import MechanicAdamW, integrations

pytestmark = [
    pytest.mark.stacks,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

trl, peft, datasets, transformers = map(import_stack, ("trl", "peft", "datasets", "transformers"))
tokenizers = import_stack("tokenizers")

WORDS = 16
STEPS, SAVED_AT = 8, 4


def tokenizer():
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, WORDS)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)


def language_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 16}
    config = transformers.LlamaConfig(vocab_size=WORDS, **sizes, **heads)
    return transformers.LlamaForCausalLM(config)


def train(folder, resume=False):
    """Return the trained weights, those that were frozen, and what was logged."""
    rows = [" ".join(f"w{2 + (i + j) % (WORDS - 2)}" for j in range(8)) for i in range(32)]
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False}
    trainer = trl.SFTTrainer(
        language_model(),
        trl.SFTConfig(
            folder,
            max_steps=STEPS,
            save_steps=SAVED_AT,
            logging_steps=SAVED_AT,
            per_device_train_batch_size=8,
            max_length=16,
            gradient_checkpointing=False,
            **quiet,
        ),
        train_dataset=datasets.Dataset.from_dict({"text": rows}),
        processing_class=tokenizer(),
        peft_config=peft.LoraConfig(r=2, target_modules="all-linear"),
        optimizer_cls_and_kwargs=(MechanicAdamW, {"lr": 1.0}),
    )
    integrations.log_learned_rates(trainer)
    checkpoint = f"{folder}/checkpoint-{SAVED_AT}"
    trainer.train(resume_from_checkpoint=checkpoint if resume else None)
    named = list(trainer.model.named_parameters())
    learned = {name: p.detach() for name, p in named if p.requires_grad}
    frozen = {name: p.detach() for name, p in named if not p.requires_grad}
    return learned, frozen, [logs for logs in trainer.state.log_history if "loss" in logs]


def test_an_adapter_learns_and_resumes_to_the_bit(tmp_path):
    learned, frozen, logs = train(str(tmp_path))
    assert learned and all("lora" in name for name in learned)
    grown = [x for name, x in learned.items() if "lora_B" in name]  # they begin at 0
    assert all(differs(x, torch.zeros_like(x)) for x in grown)
    before = {name: p for name, p in language_model().named_parameters()}
    for name, x in frozen.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(x, before[plain])
    assert len(logs) == STEPS // SAVED_AT and all(entry["effective_lr"] > 0 for entry in logs)
    assert_same(train(str(tmp_path), resume=True)[0], learned)
