"""Keys of ten published recipes, as data: those that ``lint`` reads, from the documentation of each
trainer.
"""

SEVEN = ["gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj"]
TUNE_LORA = {"lora_attn_modules": ["q_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True}
TUNE_LORA |= {"lora_rank": 64, "lora_alpha": 128}

RECIPES = {
    "axolotl examples/llama-3/lora-1b.yml": {
        "base_model": "NousResearch/Llama-3.2-1B", "adapter": "lora", "lora_r": 16, "lora_alpha": 32,
        "lora_target_modules": SEVEN, "optimizer": "adamw_8bit", "learning_rate": 0.0002, "bf16": "auto",
        "sequence_len": 2048, "sample_packing": True, "micro_batch_size": 2,
    },
    "axolotl examples/llama-3/qlora.yml": {
        "base_model": "NousResearch/Meta-Llama-3-8B", "adapter": "qlora", "load_in_4bit": True, "lora_r": 32,
        "lora_alpha": 16, "lora_target_modules": None, "lora_target_linear": True, "optimizer": "paged_adamw_32bit",
        "learning_rate": 0.0002, "bf16": "auto", "sequence_len": 4096,
    },
    "axolotl examples/llama-3/fft-8b.yaml": {
        "base_model": "meta-llama/Meta-Llama-3-8B", "optimizer": "paged_adamw_8bit", "learning_rate": "2e-5",
        "bf16": "auto", "fp16": None, "sequence_len": 8192, "fsdp": None, "deepspeed": None,
    },
    "LLaMA-Factory examples/train_lora/qwen3_lora_sft.yaml": {
        "model_name_or_path": "Qwen/Qwen3-4B-Instruct-2507", "stage": "sft", "finetuning_type": "lora", "lora_rank": 8,
        "lora_target": "all", "cutoff_len": 2048, "learning_rate": 1.0e-4, "bf16": True,
    },
    "LLaMA-Factory examples/train_full/qwen3vl_full_sft.yaml": {
        "model_name_or_path": "Qwen/Qwen3-VL-4B-Instruct", "stage": "sft", "finetuning_type": "full",
        "deepspeed": "examples/deepspeed/ds_z3_config.json", "cutoff_len": 2048, "learning_rate": 1.0e-5, "bf16": True,
    },
    "torchtune recipes/configs/llama3_2/1B_full_single_device.yaml": {
        "model": {"_component_": "torchtune.models.llama3_2.llama3_2_1b"}, "dtype": "bf16",
        "optimizer": {"_component_": "bitsandbytes.optim.PagedAdamW8bit", "lr": "2e-5"},
        "tokenizer": {"max_seq_len": None}, "max_steps_per_epoch": None,
    },
    "torchtune recipes/configs/llama3_2/1B_lora_single_device.yaml": {
        "model": {"_component_": "torchtune.models.llama3_2.lora_llama3_2_1b", **TUNE_LORA}, "dtype": "bf16",
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": "3e-4"},
    },
    "TRL docs, PEFT integration": {
        "model_name_or_path": "Qwen/Qwen2-0.5B", "use_peft": True, "lora_r": 32, "lora_alpha": 16,
        "learning_rate": 2.0e-4,
    },
    "TRL docs, LoRA Without Regret": {
        "model_name_or_path": "Qwen/Qwen2.5-3B-Instruct", "use_peft": True, "lora_r": 256, "lora_alpha": 16,
        "lora_target_modules": "all-linear", "learning_rate": 2e-4, "per_device_train_batch_size": 1,
    },
    "PEFT docs, Quicktour": {
        "peft_type": "LORA", "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "inference_mode": False, "r": 8,
        "lora_alpha": 32, "lora_dropout": 0.1,
    },
}  # fmt: skip
