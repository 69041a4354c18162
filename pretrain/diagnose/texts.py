"""The diagnosis of generated text (checks 8 and 9), whatever stage generated it."""

from collections.abc import Callable, Sequence
from functools import partial

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

Tokens = Sequence[Sequence[int]]
Measure = Callable[[Tokens], float]


def variety_figures(generated: Tokens, truth: Tokens) -> Figures:
    """distinct-n and entropy of the tokens of both, and their ratios with standard errors over documents."""
    figures: Figures = {}
    for name, texts in (("", generated), ("true_", truth)):
        for n in (1, 2):
            figures[f"{name}distinct_{n}"] = text_checks.distinct(texts, n)
        figures[f"{name}entropy"] = text_checks.entropy(texts)
    measures: dict[str, Measure] = {"distinct_2": partial(text_checks.distinct, n=2), "entropy": text_checks.entropy}
    for name, measure in measures.items():
        ratio = partial(_ratio, measure, generated, truth)
        figures[f"{name}_ratio"] = ratio(range(len(generated)))
        figures[f"{name}_ratio_error"] = text_checks.halves_error(ratio, len(generated))
    return figures


def _ratio(measure: Measure, generated: Tokens, truth: Tokens, chosen: Sequence[int]) -> float:
    own, true = (measure([texts[n] for n in chosen]) for texts in (generated, truth))
    return own / max(true, 1e-9)


def variety_verdicts(figures: Figures, limits: Diagnose) -> list[Verdict]:
    """Does generated text vary as text does?"""
    measured = {
        "distinct-2": ("distinct_2_ratio", limits.min_distinct_ratio),
        "entropy": ("entropy_ratio", limits.min_entropy_ratio),
    }
    return [
        at_least(8, f"{what} / that of true text", figures[name], limit, ".2f", figures.get(f"{name}_error"))
        for what, (name, limit) in measured.items()
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
    copied = [text_checks.copied(group, training_text.found) for group in (own, true)]
    real = [text_checks.real_words(group, training_text.words) for group in (own, true)]
    for name, words, runs in zip(("", "true_"), real, copied):
        figures |= {f"{name}real_word_share": words.share, f"{name}copied_share": runs.share}
    figures |= {"real_word_share_error": real[0].error, "copied_excess_error": copied[0].excess_error(copied[1])}
    # A model that writes nothing but symbols writes no real words either.
    figures["real_word_share"] = figures["real_word_share"] or 0.0
    return figures | {"samples": samples}


def word_verdicts(figures: Figures, limits: Diagnose) -> list[Verdict]:
    """Is it made of words, and is it copied? Nothing where words were not measured."""
    if "real_word_share" not in figures:
        return []
    own, true = figures["copied_share"], figures["true_copied_share"]
    excess = own - true if own is not None and true is not None else None
    copied, error = f"copied {text_checks.COPY_WORDS}-word runs above true text", figures.get("copied_excess_error")
    word_error = figures.get("real_word_share_error")
    return [
        at_least(8, "real words", figures["real_word_share"], limits.min_real_word_share, error=word_error),
        at_most(9, copied, excess, limits.max_copied_excess, error=error),
    ]
