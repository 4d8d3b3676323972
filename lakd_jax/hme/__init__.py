"""KDExplainer's hierarchical mixture of experts: network, losses, phases, report."""
