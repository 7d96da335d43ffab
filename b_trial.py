"""All variants of the decode kernels on the card: time and whether they give the twin's bits."""
import json, sys, time
from typing import Any
import torch
import fate_moe.gpu.experts as X
from benchmarks.gpu_kernels import differences
from benchmarks.gpu_measure import captured, milliseconds
from benchmarks.gpu_model import RandomModel
from fate_moe.gpu.options import DeviceOptions

ROUNDS = 12
began = time.time()
LIMIT = float(sys.argv[1]) if len(sys.argv) > 1 else 200

def decode(random, experts, which):
    state, layout, top_k = experts.state, experts.state.layouts[0], random.model.config.num_experts_per_tok
    hidden = torch.randn(1, layout.cols, device="cuda", dtype=torch.bfloat16)
    index = torch.arange(top_k, device="cuda")[None]
    weights = torch.rand(1, top_k, device="cuda").to(torch.bfloat16)
    out = torch.empty_like(hidden)
    experts.compute(0, hidden, index, weights)
    order = torch.randperm(state.tables.num_experts, device="cuda")
    some = [order[s : s + top_k].int().contiguous() for s in range(0, len(order) - top_k + 1, top_k)]
    kept = state.slots
    up = lambda: experts._gate_up(0, 1, 2)
    down = lambda: experts._down(0, weights, out, False)
    def both():
        up(); down()
    res = {}
    for name, launch in (("up", up), ("down", down), ("both", both)):
        if name not in which: continue
        def run():
            for slots in some:
                state.slots = slots
                launch()
        g = captured(run, ROUNDS)
        res[name] = round(min(milliseconds(g, 10) for _ in range(3)) * 1e3 / ROUNDS / len(some), 2)
    state.slots = kept
    return res

def main():
    base_up, base_down, base_early = X.gate_up_tile, X.down_tile, X.DeviceExperts._early
    for name in ("Qwen3-30B-A3B", "Qwen1.5-MoE-A2.7B"):
        random = RandomModel.make(name, num_layers=1, length=64, precision="int4")
        experts = random.experts(1.0, DeviceOptions())
        ups = [{}]
        for warps, bn in ((16, 64), (8, 32), (4, 16), (16, 32), (8, 16), (2, 8)):
            for unroll, ahead in ((4, 2), (8, 2), (4, 3), (8, 3)):
                rows = min(bn, warps)
                if 2 * bn // rows < unroll: continue
                ups.append(dict(BN=bn, ROWS=rows, num_warps=warps, UNROLL=unroll, AHEAD=ahead))
        downs = [{}, {"NEXT": 1}]
        for gb in (16, 4):
            for warps in (4, 8, 2):
                rows = warps * 32 // gb
                for bn in (4, 8, 2, 16):
                    if rows > 8 * bn or rows < 8: continue
                    steps = 8 * bn // rows
                    for unroll, ahead in ((2, 3), (4, 2), (4, 3)) if gb == 16 else ((2, 2), (4, 2), (2, 3)):
                        if unroll > max(2, steps): continue
                        downs.append(dict(GB=gb, BN=bn, ROWS=rows, num_warps=warps, UNROLL=unroll, AHEAD=ahead, NEXT=1))
        if name != "Qwen3-30B-A3B":
            ups, downs = ups[:1], downs[:2]
        tried = []
        both_lists = [x for p in __import__("itertools").zip_longest([("up", o) for o in ups], [("down", o) for o in downs]) for x in p if x]
        if 1:
            for which, o in both_lists:
                if time.time() - began > LIMIT + (0 if name.startswith("Qwen3") else 45): break
                X.gate_up_tile = lambda l, o=o: {**base_up(l), **(o if which == "up" else {})}
                X.down_tile = lambda l, k, o=o: {**base_down(l, k), **(o if which == "down" else {"NEXT": 1})}
                try:
                    bad = list(differences1(random, experts))
                    t = decode(random, experts, (which, "both"))
                except Exception as e:
                    print(name, which, o, "FAIL", repr(e)[:150], flush=True); continue
                tried.append((t[which], t["both"], which, o, bad))
                print(name, which, o, t, "DIFFER" if bad else "equal", flush=True)
        print("---- best of", name)
        for which in ("up", "down"):
            good = sorted([x for x in tried if x[2] == which and not x[4]], key=lambda x: x[0])
            for x in good[:6]: print(which, x[0], x[1], x[3])
            if good: globals()["best_" + which] = good[0][3]
        X.gate_up_tile = lambda l: {**base_up(l), **best_up}
        X.down_tile = lambda l, k: {**base_down(l, k), **best_down}
        print("best together:", decode(random, experts, ("up", "down", "both")), list(differences(random, experts)), flush=True)
        X.gate_up_tile, X.down_tile = base_up, lambda l, k: {**base_down(l, k), "NEXT": 0}
        X.DeviceExperts._early = lambda self, layer: False
        print("without early launches:", decode(random, experts, ("up", "down", "both")), flush=True)
        X.DeviceExperts._early = base_early
        X.gate_up_tile, X.down_tile = base_up, base_down
        random.close(); del random, experts; torch.cuda.empty_cache()

def differences1(random, experts):
    from fate_moe.kernels.reference import quantized_experts
    from fate_moe.quant.blob import views
    top_k = random.model.config.num_experts_per_tok
    parts = lambda e: views(random.layout, random.arena.blob(e))
    if not hasattr(random, "want"):
        torch.manual_seed(1)
        x = torch.randn(2, random.model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
        index = torch.stack([torch.randperm(2 * top_k, device="cuda")[:top_k] for _ in range(2)])
        weights = torch.rand(2, top_k, device="cuda").to(torch.bfloat16)
        random.want = x, index, weights, quantized_experts(random.layout, parts, x.cpu(), index.cpu(), weights.cpu())
    x, index, weights, want = random.want
    for _ in range(2):
        if not torch.equal(experts.compute(0, x, index, weights).cpu(), want): yield "differs"

main()
