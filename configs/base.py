"""Every key of a run, with its default. Other configs start from this one.

A size of 0 is derived, where its comment says so. Durations are given in exactly one of
train.steps, train.tokens, train.epochs, train.tokens_per_param; the others are 0.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return a small decoder on the standard library's text; set a duration to run."""
    config = ConfigDict()

    config.model = model = ConfigDict()
    model.vocab_size = 0  # ids; 0: the tokenizer's, rounded up to a multiple of 64
    model.max_length = 0  # longest row it can place; 0: data.max_length
    model.num_layers = 4
    model.embed_dim = 256
    model.num_heads = 4
    model.num_kv_heads = 0  # shared key/value heads; 0: num_heads
    model.head_dim = 0  # 0: embed_dim / num_heads
    model.mlp_dim = 0  # 0: 4 * embed_dim
    model.norm = "rmsnorm"  # rmsnorm | rmsnorm_1p (its scale is 1 + weight) | layernorm
    # What of a branch is normalised: pre (what it reads) | post (what it adds) |
    # sandwich (both).
    model.norm_position = "pre"
    model.norm_epsilon = 1e-6
    model.positions = "rope"  # rope | learned | alibi | none
    model.position_offset = 0  # learned: rows of the table before position 0
    model.rope_theta = 10_000.0
    model.rope_local_theta = 0.0  # of local layers, not scaled; 0: rope_theta, scaled
    model.rope_fraction = 1.0  # of each head's dims that turn: the first ones
    # How rope is stretched: ((kind, (factor,)), (name, values), ...), the names as in
    # models/config.py; (): not at all.
    model.rope_scaling = ()
    model.qk_norm = False  # normalise queries and keys
    model.qk_norm_over = "head"  # head (each by itself) | heads (all together)
    model.window = 0  # keys that a local layer sees, itself included; 0: all
    model.window_pattern = "L"  # repeated over layers: L local, G global
    model.attention_scale = 0.0  # of scores; 0: 1/sqrt(head_dim)
    model.attention_softcap = 0.0  # cap * tanh(scores / cap); 0: none
    model.attention_sinks = False  # each head may look at nothing, by a learned logit
    model.logits_softcap = 0.0  # the same cap on logits
    # gelu | gelu_exact | relu | relu2 | swiglu | swiglu_clamped | geglu
    model.activation = "swiglu"
    model.embed_scale = 1.0  # times the embeddings
    model.embed_norm = False  # normalise them
    model.tied_embeddings = False  # the output head is the embedding table
    model.use_bias = False  # on every linear and LayerNorm
    # Or on some: qkv attention_out mlp norm; and, never by use_bias: router head.
    model.biases = ()
    model.parallel_block = False  # attention and MLP read the same input
    model.parallel_norms = 1  # then: through one norm, or 2 of their own
    model.num_experts = 0  # MLPs of mlp_dim, of which each token takes a few; 0: dense
    model.num_experts_per_token = 0  # the likeliest of them
    model.shared_mlp_dim = 0  # of an expert that every token takes beside them; 0: none
    # Tokens that an expert takes, over the mean; the others are dropped. 0: takes all.
    model.expert_capacity = 0.0
    model.embed_init_std = 0.02
    model.init_scale = 1.0  # times 1/sqrt(fan in), for every linear
    model.dtype = "float32"  # of the operands of products: float32 | bfloat16
    model.residual_dtype = "float32"  # of what flows between them
    # What the backward pass does not make anew: none (nothing is) | dots | names |
    # offload (names, kept on the host) | full (only the residual stream is kept).
    model.remat = "none"
    # names, offload: query key value mixed attention_out mlp_gate mlp_up
    model.remat_names = ("mixed", "attention_out")

    config.data = data = ConfigDict()
    data.source = "stdlib"  # stdlib | text | tfds | hf | store | synthetic
    data.paths = ()  # text: files, globs, folders or URLs; store: token stores
    # text: held-out files; store: held-out stores; (): eval_fraction of the documents
    # by a hash of their text, and the folder `eval` of each store.
    data.eval_paths = ()
    data.eval_fraction = 0.05
    data.name = ""  # tfds: name[/config][:version]; hf: a folder, or org/name[:subset]
    data.tfds_dir = ""  # tfds: where datasets lie; "": TFDS's default
    data.split = "train"  # tfds, hf
    data.eval_split = "validation"  # tfds, hf; the same as split: eval_fraction of it
    data.text_field = "text"  # tfds, hf, .jsonl, .parquet: the field with the text
    data.on_bad_text = "error"  # error | skip | replace (mend it where that can be)
    data.max_document_bytes = 2**27  # a longer document is bad text
    data.deduplicate = False  # of documents with the same text the first stays
    data.weights = ()  # store: of each of paths, in tokens; (): by their sizes
    data.weights_at = ()  # store: ((step, weights), ...): others from that step on
    # bytes | bpe (trained on the train split) | a file: tokenizer.json, SentencePiece
    # .model, .tiktoken | store (source=store) | symbols (source=synthetic)
    data.tokenizer = "bpe"
    data.vocab_size = 4096  # bpe
    data.end_token = ""  # tokenizer files: what ends a document; "": the usual names
    data.max_length = 256  # tokens in a training row
    # split (the stream of all documents, cut) | best_fit (whole documents, packed) |
    # single (a document a row); documents longer than a row are cut in all of them.
    data.packing = "split"
    data.mask_documents = True  # attention stays within a document
    # What a row of the data is: text (a document) | completion | chat | classify |
    # preference.
    data.examples = "text"
    # Where those stand, ((name, field of the data), ...), if not under their own names:
    # prompt completion | messages | text label | prompt chosen rejected.
    data.fields = ()
    data.chat_template = ""  # a Jinja file; "": the tokenizer's, else a plain one
    data.on_long = "error"  # an example longer than a row: error | truncate | drop
    data.prompt = "{text}"  # classify: what the model reads of a row
    # classify: ((label, word), ...): the likeliest of these words next is the answer;
    # (): a head of its own on the last token.
    data.label_words = ()
    data.num_workers = 0  # processes that build a token store; 0: as many as cores
    data.cache_dir = "~/.cache/fm_jax"  # token stores and trained tokenizers

    config.synthetic = synthetic = ConfigDict()  # data.source=synthetic
    synthetic.kind = "markov"  # markov (a symbol depends on the one before) | hmm
    synthetic.num_symbols = 256  # the alphabet, an id each
    synthetic.num_states = 32  # hmm: hidden states of each component
    synthetic.num_components = 1  # chains; each document comes from one of them
    synthetic.concentration = 0.05  # of the Dirichlet rows; higher: closer to zipf's
    synthetic.zipf = 1.0  # symbols' frequencies fall as rank^-zipf; 0: alike
    synthetic.mean_length = 256.0  # symbols in a document, geometrically distributed
    synthetic.num_tokens = 4_000_000  # to train on
    synthetic.num_eval_tokens = 200_000  # held out
    synthetic.seed = 0  # of the chains and of the documents

    config.init = init = ConfigDict()
    # RUN[@STEP] or a Hugging Face folder: the first weights are those; "": random.
    init["from"] = ""
    # Its architecture and tokenizer too; dtypes, remat and data.max_length stay.
    init.model = False
    init.optimizer = False  # its optimizer and step too: the run goes on as that one

    config.finetune = finetune = ConfigDict()
    # What trains: full (all) | bias | lora | probe (a classifier's head, by logistic
    # regression) | lp_ft (that, then all) | none (nothing: as it is).
    finetune.method = "full"
    # Path rules before the method's own, first match wins, over paths with the layer's
    # number as blocks/3/mlp/up/kernel: times the learning rate; 0: frozen.
    finetune.rules = ()
    finetune.last_layers = 0  # these blocks and what comes after them; 0: all
    finetune.layer_decay = 1.0  # of the learning rate, for each layer further down
    finetune.unfreeze_every = 0  # steps till the next layer down trains; 0: all do
    finetune.preference = "dpo"  # dpo | ipo | orpo: the loss of examples=preference
    finetune.beta = 0.1  # of that loss

    config.lora = lora = ConfigDict()  # finetune.method=lora
    lora.rank = 8  # of each update of a kernel
    lora.alpha = 16.0  # its weight, before scaling
    lora.scaling = "lora"  # of the update: lora (alpha / rank) | rslora (/ sqrt(rank))
    lora.dropout = 0.0  # of what it reads
    lora.targets = "attention|mlp"  # a pattern: which kernels have one
    lora.base = "compute"  # how frozen kernels are held: compute (model.dtype) | int8

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"
    optimizer.learning_rate = 1e-3  # peak
    optimizer.weight_decay = 0.1  # decoupled, times the learning rate
    # Path rules, first match wins: which parameters decay.
    optimizer.decay_rules = (
        ("norm|bias|embedding", False),
        (".*", True),
    )
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.95
    optimizer.epsilon = 1e-8
    optimizer.mu_dtype = "float32"  # of the first moment as it is kept
    optimizer.nu_dtype = "float32"  # of the second
    optimizer.clip_norm = 1.0  # of the global gradient; 0: none

    config.schedule = schedule = ConfigDict()
    schedule.name = "cosine"  # cosine | linear | constant | wsd | inverse_sqrt
    schedule.warmup_fraction = 0.02  # of all steps
    schedule.decay_fraction = 0.2  # wsd: of all steps, at the end
    schedule.final_fraction = 0.1  # of the peak, at the end

    config.train = train = ConfigDict()
    train.steps = 0
    train.tokens = 0.0
    train.epochs = 0.0
    train.tokens_per_param = 0.0  # of all parameters
    train.batch_size = 16  # rows in a step, over all devices and accumulation
    train.accumulation = 1  # micro-batches that a step's rows are cut into
    train.seed = 0
    train.z_loss = 0.0  # weight of logsumexp squared
    train.loss_chunk = 0  # positions projected to logits at a time; 0: all
    train.ema_decay = 0.0  # average of weights, used by evaluation; 0: none
    # Of models with experts: the weight of the loss that evens out their load ...
    train.balance_loss = 0.01
    train.router_z_loss = 0.001  # ... and of their router's logsumexp squared
    # By how much a step moves each expert's balance towards an even load; 0: not.
    train.balance_rate = 0.0
    train.max_skips = 3  # steps in a row that may change nothing, not being finite
    train.compile_cache = "~/.cache/fm_jax/programs"  # of compiled programs; "": none

    config.mesh = mesh = ConfigDict()
    mesh.preset = "ddp"  # ddp | fsdp | hsdp | tensor | fsdp_tensor | context
    mesh.data = 0  # rows; 0: the preset's, -1: the devices that are left
    mesh.fsdp = 0  # rows, and weights and optimizer
    mesh.tensor = 0  # heads, MLP and vocabulary
    mesh.context = 0  # the length of rows: attention goes round a ring
    mesh.expert = 0  # rows, and experts where a model has them
    mesh.dcn_data = 1  # of mesh.data, how much runs between slices or hosts
    mesh.dcn_fsdp = 1  # of mesh.fsdp, likewise
    mesh.rules = ()  # (logical axis, mesh axes) in place of the table's

    config.eval = ConfigDict()
    config.eval.every = 200  # steps; 0: only at the end
    config.eval.batch_size = 16
    config.eval.max_batches = 16  # while training; the last evaluation takes all

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 200  # steps; 0: only at the end
    checkpoint.keep = 2  # the latest
    checkpoint.keep_best = 0  # and those with the lowest eval/loss
    checkpoint.keep_every = 0  # and those at multiples of this many steps

    config.log = ConfigDict()
    config.log.every = 10  # steps between lines of metrics.jsonl

    config.sample = sample = ConfigDict()
    sample.prompt = "def "  # what the samples at the end of training go on from
    sample.num_samples = 1
    sample.num_tokens = 128  # 0: no sample
    sample.temperature = 0.8
    sample.top_k = 0  # 0: all
    sample.top_p = 0.95
    return config
