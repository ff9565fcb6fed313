"""Build a shard set: `python data_shards/build.py table products.csv --captions title --out shards/products`."""

import sys

from mmref.cli import main

if __name__ == "__main__":
    sys.exit(main(["shards", "build", *sys.argv[1:]]))
