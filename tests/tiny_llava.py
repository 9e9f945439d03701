"""A real LLaVA and a real LLaVA-OneVision at tiny size: random weights, a tokenizer trained here, chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

_TEXT = (
    "a rough stone wall with green moss and dry grass, a red brick roof above white painted wood",
    "the calm water of a lake, dark trees and a cloudy sky; sand, glass, metal and woven cloth",
)
_SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<video>")
_EYES, _EARS, _MIND = 3.0, 1.0, 12.0
_PAD, _START, _END, _IMAGE, _VIDEO = range(len(_SPECIAL))

_LLAVA_CHAT = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_ONEVISION_CHAT = (
    "{% for message in messages %}<s>{{ message['role'] }} "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}\n{{ part['text'] }}{% endif %}{% endfor %}"
    "</s>{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Pieces of words trained on a few lines, printable bytes only, so that random tokens are mostly words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    printable = [c for c in pre_tokenizers.ByteLevel.alphabet() if " " < c <= "~"] + ["Ġ", "Ċ"]
    made.train_from_iterator(
        _TEXT,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(_SPECIAL), initial_alphabet=sorted(printable), show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )


def _save(model: LlavaForConditionalGeneration | LlavaOnevisionForConditionalGeneration, folder: Path) -> Path:
    """Random weights, scaled so that what is seen weighs more than what was said: every picture gets another text."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                seeing, hearing = "vision" in name or "projector" in name, "embed_tokens" in name
                weight.mul_(_EYES if seeing else _EARS if hearing else _MIND)
    model.generation_config.pad_token_id = _PAD
    model.generation_config.eos_token_id = _END
    model.save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> Path:
    """LLaVA-1.5's classes: CLIP, Llama, 30 x 30 pixels in patches of 10."""
    torch.manual_seed(5)
    tokenizer = _tokenizer()
    LlavaProcessor(
        image_processor=LlavaImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}),
        tokenizer=tokenizer,
        patch_size=10,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA_CHAT,
    ).save_pretrained(folder)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=30,
            patch_size=10,
        ),
        text_config=LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=len(tokenizer),
            pad_token_id=_PAD,
            bos_token_id=_START,
            eos_token_id=_END,
        ),
        image_token_index=_IMAGE,
    )
    return _save(LlavaForConditionalGeneration(config), folder)


def save_onevision(folder: Path) -> Path:
    """LLaVA-OneVision's classes: SigLIP, Qwen2, 24 x 24 pixels in patches of 8, up to 2 x 2 of them."""
    torch.manual_seed(6)
    tokenizer = _tokenizer()
    pinpoints = [[24, 24], [24, 48], [48, 24], [48, 48]]
    LlavaOnevisionImageProcessorPil(size={"height": 24, "width": 24}, image_grid_pinpoints=pinpoints).save_pretrained(
        folder
    )
    tokenizer.chat_template = _ONEVISION_CHAT
    tokenizer.save_pretrained(folder)
    # as the published folder has it: the processor's own class reads this file
    processor = {
        "num_image_tokens": 9,
        "vision_feature_select_strategy": "full",
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": "<image>",
        "video_token": "<video>",
        "vision_aspect_ratio": "anyres_max_4",
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=24,
            patch_size=8,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            pad_token_id=_PAD,
            bos_token_id=_START,
            eos_token_id=_END,
        ),
        image_token_index=_IMAGE,
        video_token_index=_VIDEO,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_4",
    )
    return _save(LlavaOnevisionForConditionalGeneration(config), folder)
