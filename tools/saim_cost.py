"""Time and peak memory of a training step of SAIM, sorted and causal, and in the paper's form with masks: saim_cost.py OUT.json [--device cuda]

Each measurement is a process of its own. `more_mb` is what forward and backward need beyond model and images, gradients included;
`seconds` is the shortest of a few steps."""
import argparse, json, math, platform, resource, subprocess, sys, time, torch, torch.nn.functional as F
from mim_nb.attention import attend, attention_weights
from mim_nb.saim import SAIM
from mim_nb.train import write_json

class Masked(SAIM):
    "Tokens in image order; who may look at whom says a mask of (B,1,1+L,1+L) numbers a stream"
    @staticmethod
    def attend(b, x, context, mask): return attend(b.attn, b.norm1(x), b.norm1(context), mask)

    def block(self, b, x, context, mask):
        x = x + b.drop_path1(self.attend(b, x, context, mask))
        return x + b.drop_path2(b.mlp(b.norm2(x)))

    def masks(self, order):
        turn = torch.cat([torch.zeros_like(order[:,:1]), 1+order.argsort(1)], 1)
        later = turn[:,None,None,:]-turn[:,None,:,None]
        content,query = (torch.zeros(later.shape, device=order.device).masked_fill(later>k, -math.inf) for k in (0,-1))
        return content,query[:,:,1:]

    def encode(self, x, mask):
        e,(content,query) = self.encoder,self.masks(mask)
        h = torch.cat([e.cls_token.expand(len(x), -1, -1), e.patch_embed(x)], 1)+e.pos_embed
        g = e.pos_embed[:,1:].expand(len(x), -1, -1)
        step = len(e.blocks)//self.query_depth
        for i,b in enumerate(e.blocks):
            h = self.block(b, h, h, content)
            if (i+1)%step==0: g = self.block(self.query_blocks[i//step], g, h, query)
        return g

    def decode(self, z, mask): return self.head(self.encoder.norm(z))

class Scores(Masked):
    "The same with all scores and weights of attention written down, as the authors' code does"
    @staticmethod
    def attend(b, x, context, mask):
        a,(x,context) = b.attn,(b.norm1(x), b.norm1(context))
        (w,bias),d = (a.qkv.weight,a.qkv.bias),x.shape[-1]
        q,(k,v) = F.linear(x, w[:d], bias[:d]),F.linear(context, w[d:], bias[d:]).chunk(2, -1)
        q,k,v = (o.unflatten(-1, (a.num_heads, -1)).transpose(1,2) for o in (q,k,v))
        return a.proj((attention_weights(q, k, mask) @ v).transpose(1,2).flatten(2))

versions = {'sorted, causal': SAIM, 'masked': Masked, 'masked, scores written out': Scores}

def peak(device):
    "Most memory so far, MB"
    return torch.cuda.max_memory_allocated()/2**20 if device=='cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform=='darwin' else 2**10)

def wait(device):
    if device=='cuda': torch.cuda.synchronize()

def measure(version, preset, batch, device, steps):
    torch.manual_seed(0)
    m = versions[version](**SAIM.presets[preset]).to(device)
    images,order = torch.rand(batch, m.in_chans, *m.img_size, device=device),m.sample_mask(batch)
    if device=='cuda': torch.cuda.reset_peak_memory_stats()
    before,seconds = peak(device),[]
    for _ in range(steps):
        wait(device); start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=device=='cuda'): loss = m(images, order).loss
        loss.backward(); wait(device)
        seconds.append(time.perf_counter()-start)
        if len(seconds)==1: more = peak(device)-before
        m.zero_grad()
    return dict(version=version, preset=preset, batch=batch, loss=loss.item(), more_mb=more, peak_mb=peak(device), seconds=min(seconds), all_seconds=seconds)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out', help='JSON file for the result'); p.add_argument('--preset', default='base'); p.add_argument('--batch', type=int, default=8)
    p.add_argument('--steps', type=int, default=3); p.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    p.add_argument('--version', choices=versions, help='measure this one, print it, and write nothing')
    a = p.parse_args()
    if a.version: print(json.dumps(measure(a.version, a.preset, a.batch, a.device, a.steps))); sys.exit()
    args = ['--preset', a.preset, '--batch', str(a.batch), '--steps', str(a.steps), '--device', a.device]
    runs = [json.loads(subprocess.run([sys.executable, __file__, a.out, *args, '--version', v], check=True, capture_output=True, text=True).stdout) for v in versions]
    machine = dict(device=torch.cuda.get_device_name() if a.device=='cuda' else f'{platform.machine()} CPU, {torch.get_num_threads()} threads', torch=torch.__version__)
    write_json(a.out, dict(command=f"python tools/saim_cost.py {a.out} {' '.join(args)}", machine=machine, runs=runs))
