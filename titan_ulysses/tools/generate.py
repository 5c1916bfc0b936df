"""Generate text with an exported model and plain transformers, to see what was trained.

    titan-ulysses generate outputs/quickstart/export --prompt "def "
    titan-ulysses generate outputs/smollm2_chat/export --chat "Who art thou?"
    titan-ulysses generate MODEL --adapter outputs/smollm2_lora/adapter --chat "Who art thou?"

--chat uses the chat template of the tokenizer.
"""

from __future__ import annotations

from pathlib import Path

from titan_ulysses.tools import parser_of


def main(argv: list[str]) -> None:
    parser = parser_of("generate", __doc__)
    parser.add_argument("folder", type=Path, help="what AutoModelForCausalLM.from_pretrained opens")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text to go on from")
    what.add_argument("--chat", help="what a user says")
    parser.add_argument("--adapter", type=Path, help="a LoRA adapter for it")
    parser.add_argument("--tokens", type=int, default=100, help="new ones, at most (default: 100)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0: the likeliest token (default: 0.8)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for option, path in (("FOLDER", args.folder), ("--adapter", args.adapter)):
        if path is not None and not path.is_dir():
            parser.error(f"{option}: there is no folder {path}")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=False)
    if args.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter)
    if args.chat is None:
        inputs = tokenizer(args.prompt, return_tensors="pt", add_special_tokens=False)
    elif tokenizer.chat_template is None:
        parser.error(f"--chat: the tokenizer in {args.folder} has no chat template; use --prompt")
    else:
        messages = [{"role": "user", "content": args.chat}]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = tokenizer.apply_chat_template(messages, **options)
    torch.manual_seed(args.seed)
    sampling = (
        {"do_sample": True, "temperature": args.temperature}
        if args.temperature
        else {"do_sample": False}
    )
    output = model.generate(
        **inputs, max_new_tokens=args.tokens, pad_token_id=tokenizer.eos_token_id, **sampling
    )
    print(tokenizer.decode(output[0], skip_special_tokens=args.chat is None))
