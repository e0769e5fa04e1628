"""Texts: files of them, token ids, and datasets of classes of texts."""
