"""The floor of `text/news`: logistic regression on character n-grams, on the recipe's own splits.

    python -m mmlong.experiments.floors.char_ngrams

TF-IDF of the 1- to 5-grams inside words (at most 200,000, sublinear), the usual strong simple method; the regularisation is chosen on validation, and the
test set is looked at once. Needs scikit-learn.
"""

from __future__ import annotations

from mmlong.datamodules.records import Record
from mmlong.experiments.floors.kmers import read_splits

STRENGTHS = (1.0, 10.0, 100.0)


def floor() -> tuple[float, float, float]:
    """``(strength, validation accuracy, test accuracy)``."""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise SystemExit("this floor needs scikit-learn: pip install scikit-learn") from error
    parts = read_splits("news")

    def texts(records: list[Record]) -> list[str]:
        return [record.load().decode() for record in records]

    def labels(records: list[Record]) -> list[int]:
        return [record.labels["topic"] for record in records]

    words = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 5), max_features=200_000, sublinear_tf=True)
    features = {"train": words.fit_transform(texts(parts["train"]))}
    features |= {split: words.transform(texts(parts[split])) for split in ("val", "test")}
    tried = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=1000).fit(features["train"], labels(parts["train"]))
        tried.append((model.score(features["val"], labels(parts["val"])), -strength, model))
    accuracy, strength, model = max(tried, key=lambda one: one[:2])
    return -strength, accuracy, model.score(features["test"], labels(parts["test"]))


if __name__ == "__main__":
    strength, validated, tested = floor()
    print(f"news: character 1- to 5-grams, C = {strength:g}: validation accuracy {validated:.4f}, test {tested:.4f}")
