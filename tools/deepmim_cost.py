"""What taps and decoders cost: deepmim_cost.py OUT.json [--preset base] [--batch 8] [--steps 5] [--device cuda]

One training step (forward, backward, AdamW) of the encoder on all patches, of MAE, and of DeepMIM with more and more taps and deeper decoders. Each is a process of its
own; `seconds` is the median of `steps` steps after one to warm up (on the CPU, seconds of the processor, so that other work of the machine does not count), `more_mb` what the steps need beyond model, images and optimizer, `gflop` counts a forward pass of one image."""
import argparse, json, statistics, subprocess, sys, time, torch
from torch.utils.flop_counter import FlopCounterMode
from mim_nb.deepmim import DeepMIM, spread_taps
from mim_nb.mae import MAE
from mim_nb.files import write_json
from mcbeit_memory import peak

def versions(depth, decoder_depth):
    "What to measure: name -> class and arguments"
    taps = spread_taps(depth)
    return {'encoder, all patches': (MAE, dict(decoder_depth=0)), f'MAE, 1 decoder of {decoder_depth}': (MAE, {}),
            **{f'DeepMIM, {n} decoder{"s"*(n>1)} of {decoder_depth//2}': (DeepMIM, dict(taps=taps[-n:])) for n in range(1, len(taps)+1)},
            **{f'DeepMIM, {len(taps)} decoders of {d}': (DeepMIM, dict(taps=taps, decoder_depth=d)) for d in (1, decoder_depth) if d!=decoder_depth//2}}

def now(device):
    "Seconds: of a clock once the GPU has finished, or of this process's work on the CPU"
    if device=='cpu': return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()

def measure(name, a):
    torch.manual_seed(0)
    preset = MAE.presets[a.preset]; cls,kw = versions(preset['depth'], preset['decoder_depth'])[name]
    m = cls(**{**cls.presets[a.preset], **kw}).to(a.device)
    images,mask = torch.rand(a.batch, m.in_chans, *m.img_size, device=a.device),m.sample_mask(a.batch)
    one = m.sample_mask(1)
    full = name.startswith('encoder')
    loss = (lambda: m.encoder(images).pow(2).mean()) if full else (lambda: m(images, mask).loss)
    with FlopCounterMode(display=False) as flops, torch.no_grad(): m.encoder(images[:1]) if full else m.decode(m.encode(images[:1], one), one)
    opt,times = torch.optim.AdamW([p for p in (m.encoder if full else m).parameters() if p.requires_grad]),[]
    for p in opt.param_groups[0]['params']: p.grad = torch.zeros_like(p)
    opt.step()                                                    # so that its memory is there before we count
    if a.device=='cuda': torch.cuda.reset_peak_memory_stats()
    before = peak(a.device)
    for _ in range(a.steps+1):
        start = now(a.device)
        with torch.autocast(a.device, torch.bfloat16, enabled=a.device=='cuda'): l = loss()
        l.backward(); opt.step(); opt.zero_grad(set_to_none=False)
        times.append(now(a.device)-start)
    return dict(version=name, preset=a.preset, batch=a.batch, seconds=round(statistics.median(times[1:]), 4), more_mb=round(peak(a.device)-before), gflop=round(flops.get_total_flops()/1e9, 3),
                parameters=sum(p.numel() for p in (m.encoder if full else m).parameters()))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', help='JSON file for the result'); p.add_argument('--preset', default='base'); p.add_argument('--batch', type=int, default=8); p.add_argument('--steps', type=int, default=5)
    p.add_argument('--device', default='cpu', choices=('cpu', 'cuda')); p.add_argument('--version', help='measure this one, print it, and write nothing')
    a = p.parse_args()
    if a.version: print(json.dumps(measure(a.version, a))); sys.exit()
    from mim_nb.pretrain import machine             # here, so that the measured processes do not hold it
    args = ['--preset', a.preset, '--batch', str(a.batch), '--steps', str(a.steps), '--device', a.device]
    runs = []
    for v in versions(MAE.presets[a.preset]['depth'], MAE.presets[a.preset]['decoder_depth']):
        runs.append(json.loads(subprocess.run([sys.executable, __file__, a.out, *args, '--version', v], check=True, capture_output=True, text=True).stdout))
        print(f"{v:28}{runs[-1]['seconds']:8.3f} s a step{runs[-1]['more_mb']:8} MB{runs[-1]['gflop']:8.2f} GFLOP", flush=True)
    write_json(a.out, dict(command=f"python tools/deepmim_cost.py {a.out} {' '.join(args)}", machine=machine(torch.device(a.device)), runs=runs))
