"""The four trainings: tokenizer, SFT, reward models, DPO. Each starts from its own seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
# One user turn renders to the same ids as the plain prompt, so both ways of asking agree.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if not loop.first %} {% endif %}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts BOS in front of every text.

    It merges to the end, so that every word of the grammar becomes one token; any other text still
    round-trips.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[PAD, BOS, EOS, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def shared_arguments(
    folder: Path, learning_rate: float, batch_size: int, seed: int
) -> dict[str, Any]:
    """Return the training arguments that all steps have in common; nothing is kept on the way."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": 1,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "weight_decay": 0.01,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 50,
        "report_to": "none",
        "disable_tqdm": True,
    }


def train_sft(
    prompts: list[str],
    reviews: list[str],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    seed: int,
) -> None:
    """Train a small Llama on (prompt, review) pairs; the loss is on the review and its EOS."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config),
        args=SFTConfig(**shared_arguments(folder, 3e-3, 32, seed)),
        train_dataset=Dataset.from_dict({"prompt": prompts, "completion": reviews}),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))


def train_reward(
    chosen_ids: list[list[int]],
    rejected_ids: list[list[int]],
    tokenizer: PreTrainedTokenizerFast,
    sft: Path,
    folder: Path,
    seed: int,
) -> None:
    """Train a reward model on preference pairs, starting from the SFT model.

    The pairs come as token ids because some of them end without EOS, as cut roll-outs do.
    """
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(sft, num_labels=1)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            center_rewards_coefficient=0.01, **shared_arguments(folder, 1e-3, 32, seed)
        ),
        train_dataset=Dataset.from_dict({"chosen_ids": chosen_ids, "rejected_ids": rejected_ids}),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))


def train_dpo(
    prompts: list[str],
    chosen: list[str],
    rejected: list[str],
    tokenizer: PreTrainedTokenizerFast,
    sft: Path,
    folder: Path,
    beta: float,
    seed: int,
) -> None:
    """Align the SFT model to the preferences of r_BL by DPO with KL weight ``beta``."""
    set_seed(seed)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(sft),
        ref_model=AutoModelForCausalLM.from_pretrained(sft),
        args=DPOConfig(
            beta=beta, precompute_ref_log_probs=True, **shared_arguments(folder, 3e-4, 64, seed)
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": prompts, "chosen": chosen, "rejected": rejected}
        ),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))
