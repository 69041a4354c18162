"""The diagnosis of generated text (checks 8 and 9), whatever stage generated it."""

from collections.abc import Sequence

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.prompts import Prompt
from data_pipeline.text.detokenizer import Detokenizer
from pretrain.config.schema import RunConfig
from pretrain.config.sections import Diagnose
from pretrain.diagnose import text_checks
from pretrain.diagnose.diagnosis import phase, say
from pretrain.diagnose.verdicts import Figures, Verdict, at_least, at_most

SHOWN_SAMPLES = 3


def variety_figures(generated: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]) -> Figures:
    """distinct-n and entropy of the tokens of both, and their ratios."""
    figures: Figures = {}
    for name, texts in (("", generated), ("true_", truth)):
        for n in (1, 2):
            figures[f"{name}distinct_{n}"] = text_checks.distinct(texts, n)
        figures[f"{name}entropy"] = text_checks.entropy(texts)
    for name in ("distinct_2", "entropy"):
        figures[f"{name}_ratio"] = figures[name] / max(figures[f"true_{name}"], 1e-9)
    return figures


def variety_verdicts(figures: Figures, limits: Diagnose) -> list[Verdict]:
    """Does generated text vary as text does?"""
    return [
        at_least(8, "distinct-2 / that of true text", figures["distinct_2_ratio"], limits.min_distinct_ratio, ".2f"),
        at_least(8, "entropy / that of true text", figures["entropy_ratio"], limits.min_entropy_ratio, ".2f"),
    ]


def word_figures(
    config: RunConfig, manifest: Manifest, prompts: Sequence[Prompt], generated: Sequence[Sequence[int]]
) -> Figures:
    """Shares of the generated text that occur in the training text: of its words, and of whole sequences of words."""
    try:
        detokenizer = Detokenizer(config.data.path, manifest)
    except UserError as error:
        say(f"  words are not measured: {error}")
        return {}
    texts = detokenizer.texts(generated)
    true_texts = detokenizer.texts([prompt.target_T.tolist() for prompt in prompts])
    own, true = ([text_checks.words(text, whole=False) for text in group] for group in (texts, true_texts))
    wanted = {gram for words in (*own, *true) for gram in text_checks.ngrams(words, text_checks.COPY_WORDS)}
    rows = min(sum(shard.rows for shard in manifest.splits["train"]), config.diagnose.training_rows)
    with phase("text: words of the training rows", rows) as tick:
        training_text = text_checks.TrainingText.read(
            config.data.path, manifest, detokenizer, wanted, rows, tick, **config.data.reading()
        )
    contexts = detokenizer.texts([prompt.context_T.tolist() for prompt in prompts[:SHOWN_SAMPLES]])
    samples = [
        {"context": context, "generated": text, "true": true_text}
        for context, text, true_text in zip(contexts, texts, true_texts)
    ]
    figures: Figures = {"training_rows_read": training_text.rows, "training_words": len(training_text.words)}
    for name, group in (("", own), ("true_", true)):
        figures[f"{name}real_word_share"] = text_checks.real_word_share(group, training_text.words)
        figures[f"{name}copied_share"] = text_checks.copied_share(group, training_text.found)
    # A model that writes nothing but symbols writes no real words either.
    figures["real_word_share"] = figures["real_word_share"] or 0.0
    return figures | {"samples": samples}


def word_verdicts(figures: Figures, limits: Diagnose) -> list[Verdict]:
    """Is it made of words, and is it copied? Nothing where words were not measured."""
    if "real_word_share" not in figures:
        return []
    own, true = figures["copied_share"], figures["true_copied_share"]
    excess = own - true if own is not None and true is not None else None
    return [
        at_least(8, "real words", figures["real_word_share"], limits.min_real_word_share),
        at_most(9, f"copied {text_checks.COPY_WORDS}-word runs above true text", excess, limits.max_copied_excess),
    ]
