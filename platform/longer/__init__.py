"""Ranking with ultra-long user histories on Ray: sequences, LONGER, appendable user states, online and batch scoring."""
