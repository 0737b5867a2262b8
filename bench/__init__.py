"""What is fast, what is not, and how fast it could be."""

from prepare.arguments import begin

begin()
