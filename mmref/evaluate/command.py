"""`mmref evaluate`: scores a model on a split."""

from __future__ import annotations

from collections.abc import Sequence

from mmref.terminal.arguments import count, model, place, run_dir_argument, text
from mmref.terminal.parser import Parser


def main(argv: Sequence[str]) -> int:
    """`mmref evaluate` and jobs/evaluate.py."""
    parser = Parser(
        prog="mmref evaluate",
        description="Score the best checkpoint of a run, or a pretrained model or export, on a split, before and after "
        "refinement, which is chosen on val.",
    )
    parser.add_argument(
        "--model", "--checkpoint", required=True, type=model, metavar="MODEL",
        help="run directory of `mmref train`, folder of `mmref export`, or pretrained model by hub id or folder",
    )  # fmt: skip
    run_dir_argument(parser)
    parser.add_argument("--data", type=place, metavar="SHARDS", help="shard set; default: that of the run")
    parser.add_argument("--split", default="test", help="split to report (default: test); refinement is chosen on val")
    parser.add_argument("--out", type=place, metavar="FILE", help="also write the metrics to this file or URL")
    parser.add_argument(
        "--workers", type=count,
        help="Ray actors that compute features; 0: in this process (default: eval.workers; 0 without Ray)",
    )  # fmt: skip
    parser.add_argument(
        "--image-to-image", action="store_true", help="also let every image search the others for images of its object"
    )
    parser.add_argument(
        "--same-camera", type=text, metavar="FIELD",
        help="the same, without an object's images by the query's own camera: the field of the samples that names it",
    )  # fmt: skip
    parser.add_argument(
        "--captions-as-one",
        choices=("image", "object"),
        help="also search with all captions of an image, or object, as one query",
    )
    parser.add_argument("--no-report", action="store_true", help="do not write report.html")
    args = parser.parse_args(argv)
    from mmref.evaluate.evaluation import changed_options, evaluate_model

    changes = changed_options(args.image_to_image, args.same_camera, args.captions_as_one)
    evaluate_model(args.model, args.data, args.split, args.out, args.workers, not args.no_report, args.run_dir, changes)
    return 0
