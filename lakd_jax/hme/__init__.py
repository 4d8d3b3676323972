"""Implements KDExplainer's hierarchical mixture of experts, with losses and report."""
