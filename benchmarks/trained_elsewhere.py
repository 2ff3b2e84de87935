"""Train a Llama with transformers alone, with a tokenizer of its own, for `storylab import` to read.

    python benchmarks/trained_elsewhere.py data/NAME --out DIR [--iterations 300]

reads the training stories of a prepared data set. Nothing of storylab trains, encodes or saves. Needs
transformers and tokenizers. Then:

    storylab import DIR --out_dir models/elsewhere
    storylab compare RUN models/elsewhere
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from storylab.data.dataset import load_dataset
from storylab.data.layout import TRAIN
from storylab.imported.evaluation import story_texts

END = "<|endoftext|>"
BATCH, BLOCK, PEAK = 16, 256, 3e-3


def make_tokenizer(stories: list[str], size: int) -> Tokenizer:
    """A byte-level byte-pair encoding of ``size`` ids; the end of text is id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(stories, trainer)
    return tokenizer


def train(model: LlamaForCausalLM, ids: torch.Tensor, iterations: int) -> None:
    """AdamW on random windows of ``ids [N]``; the learning rate rises for a tenth and falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.1)
    for i in range(iterations):
        rate = min(1.0, 10 * (i + 1) / iterations, (iterations - i) / (0.9 * iterations))
        optimizer.param_groups[0]["lr"] = PEAK * rate
        starts = torch.randint(len(ids) - BLOCK, (BATCH,)).tolist()
        batch = torch.stack([ids[start : start + BLOCK] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if i % 50 == 0 or i == iterations - 1:
            print(f"iteration {i}: loss {loss.item():.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--vocab_size", type=int, default=2048)
    args = parser.parse_args()
    torch.manual_seed(0)
    dataset = load_dataset(args.data_dir)
    texts = story_texts(dataset.splits[TRAIN], dataset.tokenizer)
    stories = [text.decode("utf-8", "replace") for text in texts]
    tokenizer = make_tokenizer(stories, args.vocab_size)
    encoded = tokenizer.encode_batch([story + END for story in stories])
    ids = torch.tensor([token for each in encoded for token in each.ids])
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        **shape,
        **heads,
    )
    model = LlamaForCausalLM(config)
    train(model, ids, args.iterations)
    model.save_pretrained(args.out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(args.out)
    print(f"{model.num_parameters():,} parameters, {args.iterations * BATCH * BLOCK:,} tokens")


if __name__ == "__main__":
    main()
