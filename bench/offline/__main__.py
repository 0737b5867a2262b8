from bench.offline import main
from prepare.arguments import command

if __name__ == "__main__":
    command(main)
