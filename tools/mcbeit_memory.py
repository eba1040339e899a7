"""Peak memory of one forward and backward of mc-BEiT, as it is and with all logits and the refined target built: mcbeit_memory.py OUT.json [--device cuda]

Each measurement is a process of its own; `more_mb` is what a whole step, or the head and the loss alone, need beyond model, images and the tokenizer's logits."""
import argparse, json, resource, subprocess, sys, time, torch
from mim_nb.mcbeit import McBEiT, refine
from mim_nb.files import write_json

class Plain(McBEiT):
    "The same loss, with logits and a refined target at every place"
    def decode(self, z, mask): return self.head(z[:,1:])
    def loss(self, pred, target, mask, z):
        t = refine((target/self.tau).softmax(-1), z[:,1:], self.omega, self.tau_sim)
        return -(t*pred.log_softmax(-1)).sum(-1)[mask.hidden].mean()
    def logs(self, pred, target, mask): return {}

versions = {'hidden places only': McBEiT, 'all logits and the target': Plain}

def peak(device):
    "Most memory so far, MB"
    return torch.cuda.max_memory_allocated()/2**20 if device=='cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform=='darwin' else 2**10)

def measure(version, part, preset, batch, device):
    torch.manual_seed(0)
    m = versions[version](**{**McBEiT.presets[preset], 'drop_path': 0.}).to(device)
    images,mask = torch.rand(batch, m.in_chans, *m.img_size, device=device),m.sample_mask(batch)
    target = torch.randn(batch, m.num_patches, m.head.out_features, device=device).mul_(3)
    z = torch.randn(batch, m.num_patches+1, m.encoder.embed_dim, device=device, requires_grad=True)
    if device=='cuda': torch.cuda.reset_peak_memory_stats()
    before,start = peak(device),time.time()
    loss = m(images, mask, target).loss if part=='step' else m.loss(m.decode(z, mask), target, mask, z)
    loss.backward()
    return dict(version=version, part=part, preset=preset, batch=batch, loss=loss.item(), more_mb=peak(device)-before, peak_mb=peak(device), seconds=time.time()-start)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', help='JSON file for the result'); p.add_argument('--preset', default='base'); p.add_argument('--batch', type=int, default=8)
    p.add_argument('--device', default='cpu', choices=('cpu', 'cuda')); p.add_argument('--version', choices=versions, help='measure this one, print it, and write nothing'); p.add_argument('--part', default='step', choices=('step', 'loss'))
    a = p.parse_args()
    if a.version: print(json.dumps(measure(a.version, a.part, a.preset, a.batch, a.device))); sys.exit()
    from mim_nb.pretrain import machine             # here, so that the measured processes do not hold it
    args = ['--preset', a.preset, '--batch', str(a.batch), '--device', a.device]
    runs = [json.loads(subprocess.run([sys.executable, __file__, a.out, *args, '--version', v, '--part', part], check=True, capture_output=True, text=True).stdout)
            for part in ('step', 'loss') for v in versions]
    write_json(a.out, dict(command=f"python tools/mcbeit_memory.py {a.out} {' '.join(args)}", machine=machine(torch.device(a.device)), runs=runs))
    for r in runs: print(f"{r['version']:28}{r['part']:6}{r['more_mb']:8.0f} MB   loss {r['loss']:.6f}   {r['seconds']:.1f} s")
