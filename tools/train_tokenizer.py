"""Train the 4,096-entry byte-level BPE tokenizer of the embedded tiny Mixtral.

It is trained on the same open texts as the model (see ``pretrain_corpus.py``); ViGGO and dolly rows 0..999 are left
out. Digits are split one by one. Lower-case words carry their leading space as in GPT-style tokenizers, capitalised
words and digits do not: a name or a year then has the same ids inside a sentence and inside brackets, which makes
copying much easier for a model of this size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pretrain_corpus import load_corpus
from pretrain_windows import training_texts

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]
PIECES = (
    r"'(?:[sdmt]|ll|ve|re)\b"  # contractions
    r"| ?[\p{Ll}\p{Lo}\p{Lm}]+"  # lower-case words with their space
    r"|\p{Lu}+(?!\p{Ll})|[\p{Lu}\p{Lt}]\p{Ll}*"  # capitals and capitalised words without it
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]"  # one mark at a time, so that brackets never merge with what they enclose
    r"|\s+(?!\S)|\s+"
)


def build_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train on ``texts`` and set up pieces, byte fallback and the leading ``<s>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json and the two small files that AutoTokenizer reads beside it."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 2048,
        "padding_side": "right",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (out / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with text/, dolly/, instruct/ and chat/")
    parser.add_argument("--out", type=Path, required=True, help="folder the tokenizer files go to")
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args()
    texts = list(training_texts(load_corpus(args.data), rows=20000, seed=0))
    tokenizer = build_tokenizer(texts, args.vocab_size)
    save_tokenizer(tokenizer, args.out)
    print(f"{tokenizer.get_vocab_size()} entries, {sum(map(len, texts)):,} characters read")


if __name__ == "__main__":
    main()
