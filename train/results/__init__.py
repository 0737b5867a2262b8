"""What becomes of a run: its folder and what it prints, its row in the ledger, the audit and the judgement on its
number."""
