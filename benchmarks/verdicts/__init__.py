"""The verdict zoo: defenses whose true robustness is known, and what an audit that is told nothing says of them."""
