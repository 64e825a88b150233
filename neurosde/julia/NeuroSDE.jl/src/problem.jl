# What the kernels work on: networks × trials × neurons, the time step folded in,
#
#     h[t+1] = a ∘ h[t] + Ŵ φ(h[t]) + Î[t] + σ ∘ dB[t],    a = 1 − dt/τ, Ŵ = (dt/τ) W, Î = (dt/τ) I.
#
# Memory is the caller's: pointers with strides in numbers (not bytes); neurons are contiguous, a stride of 0 repeats.

"A tensor over (step, network, trial, neuron); neurons contiguous, or one number for all if `neuron` is 0."
struct Field{T}
    pointer::Ptr{T}
    step::Int
    network::Int
    trial::Int
    neuron::Int
end
Field{T}() where {T} = Field{T}(C_NULL, 0, 0, 0, 0)

Base.isempty(f::Field) = f.pointer == C_NULL
@inline row(f::Field{T}, t::Int, m::Int, k::Int) where {T} =
    f.pointer + (t * f.step + m * f.network + k * f.trial) * sizeof(T)

"Where the increments dB come from."
struct Noise{T}
    increments::Field{T}   # given, or
    keys::Ptr{UInt64}      # drawn: one key per network,
    firsts::Ptr{Int64}     # the element that network's first number is,
    scale::T               # and √dt
end
Noise{T}() where {T} = Noise{T}(Field{T}(), C_NULL, C_NULL, one(T))
Base.isempty(n::Noise) = isempty(n.increments) && n.keys == C_NULL
drawn(n::Noise) = n.keys != C_NULL

"How a long computation learns that it is not wanted any more: nobody watches by default."
struct Watch
    stop::Ptr{Int64}  # a number that another process makes non-zero to interrupt, or C_NULL
    socket::Cint      # hangs up when that process is gone, or −1
end
Watch() = Watch(C_NULL, -1)

"A batch of recursions; see the top of problem.jl."
struct Problem{T,F<:Activation}
    phi::F
    networks::Int
    trials::Int
    neurons::Int
    steps::Int
    weights::Ptr{T}   # (network, post, pre), row-major
    state::Field{T}
    decay::Field{T}   # no steps, no trials
    input::Field{T}
    sigma::Field{T}
    noise::Noise{T}
    watch::Watch
end

@inline interrupted(p::Problem) = p.watch.stop != C_NULL && unsafe_load(p.watch.stop) != 0

struct PollFD
    fd::Cint
    events::Cshort
    revents::Cshort
end
const POLLIN, POLLERR, POLLHUP = Cshort(1), Cshort(8), Cshort(16)

"Events among `events` on a file descriptor within `timeout` milliseconds."
function poll(fd::Cint, events::Cshort, timeout::Integer)
    query = Ref(PollFD(fd, events, 0))
    ccall(:poll, Cint, (Ptr{PollFD}, Culong, Cint), query, 1, timeout) > 0 ? query[].revents : Cshort(0)
end

"End the process if the one it works for is gone."
function exit_if_orphaned(p::Problem)
    p.watch.socket >= 0 && (poll(p.watch.socket, Cshort(0), 0) & POLLHUP) != 0 && ccall(:_exit, Cvoid, (Cint,), 0)
    nothing
end

# A step of this many multiplications takes so long that asking after the other process costs nothing.
large_step(p::Problem, trials::Int) = trials * p.neurons^2 > 200_000

"Scratch memory of one thread; grows, never shrinks by itself."
mutable struct Workspace{T}
    memory::Vector{T}
    used::Int
    sums::Vector{T}  # of ∂L/∂Ŵ, rows padded to whole vectors
end
Workspace{T}() where {T} = Workspace{T}(T[], 0, T[])

"Make room for `total` numbers and start handing them out."
function reset!(w::Workspace{T}, total::Int) where {T}
    length(w.memory) < total && resize!(w.memory, total)
    w.used = 0
    w
end

const ALIGNMENT = 64

"Next `count` numbers of the workspace, aligned, with a vector's room behind them."
@inline function take!(w::Workspace{T}, count::Int) where {T}
    base = pointer(w.memory)
    start = base + w.used * sizeof(T)
    aligned = Ptr{T}((UInt(start) + ALIGNMENT - 1) & ~UInt(ALIGNMENT - 1))
    w.used = Int(aligned - base) ÷ sizeof(T) + count + ALIGNMENT ÷ sizeof(T)
    aligned
end

"Upper bound of what `take!` uses for `count` numbers."
room(count::Int, ::Type{T}) where {T} = count + 2 * ALIGNMENT ÷ sizeof(T)

"Copy a field's rows of trials `first … first + count − 1` at (t, m) to a contiguous slab."
@inline function gather!(dst::Ptr{T}, f::Field{T}, t::Int, m::Int, first::Int, count::Int, N::Int) where {T}
    if f.neuron == 1 && f.trial == N
        unsafe_copyto!(dst, row(f, t, m, first), count * N)
        return nothing
    end
    for k in 0:count-1
        src, out = row(f, t, m, first + k), dst + k * N * sizeof(T)
        if f.neuron == 1
            unsafe_copyto!(out, src, N)
        else
            value = unsafe_load(src)
            for n in 1:N
                unsafe_store!(out, value, n)
            end
        end
    end
    nothing
end

"Copy a contiguous slab to a field's rows; past the caches where they are contiguous too, not in bits of cache lines."
@inline function scatter!(f::Field{T}, src::Ptr{T}, t::Int, m::Int, first::Int, count::Int, N::Int) where {T}
    if f.trial == N
        stream!(row(f, t, m, first), src, count * N)
        return nothing
    end
    for k in 0:count-1
        unsafe_copyto!(row(f, t, m, first + k), src + k * N * sizeof(T), N)
    end
    nothing
end

"Copy `count` numbers past the caches: what a simulation returns is not read again before it has ended."
@inline function stream!(dst::Ptr{T}, src::Ptr{T}, count::Int) where {T}
    V = Vec{lanes(T),T}
    ahead = min(Int(-UInt(dst) % UInt(REGISTER_BYTES)) ÷ sizeof(T), count)  # to the first aligned number
    unsafe_copyto!(dst, src, ahead)
    i = ahead
    while i + lanes(T) <= count
        vstream!(dst + i * sizeof(T), vload(V, src + i * sizeof(T)))
        i += lanes(T)
    end
    unsafe_copyto!(dst + i * sizeof(T), src + i * sizeof(T), count - i)
    nothing
end

# Elementwise passes over slabs. `map!` is in activation.jl; these take more operands.
for (name, operands) in ((:map2!, (:a, :b)), (:map3!, (:a, :b, :c)), (:map4!, (:a, :b, :c, :d)))
    whole = [:(vload(V, $x + i * sizeof(T))) for x in operands]
    part = [:(vload_part(V, $x + i * sizeof(T), count - i)) for x in operands]
    @eval @inline function $name(f::F, dst::Ptr{T}, $((:($x::Ptr{T}) for x in operands)...), count::Int) where {F,T}
        V = Vec{lanes(T),T}
        i = 0
        while i + lanes(T) <= count
            vstore!(dst + i * sizeof(T), f($(whole...)))
            i += lanes(T)
        end
        i < count && vstore_part!(dst + i * sizeof(T), f($(part...)), count - i)
        nothing
    end
end

"Most trials that are stepped together: their slabs stay in cache, and the weights are read often enough to pay for it."
block_trials(N::Int) = max(32, 4096 ÷ N)

"Units of work: every network, its trials in `parts` nearly equal parts."
struct Units
    networks::Int
    trials::Int
    parts::Int
end
Base.length(u::Units) = u.networks * u.parts
"Network, first trial and number of trials of unit i (from 0), and which part it is."
function unit(u::Units, i::Int)
    m, part = divrem(i, u.parts)
    low, more = divrem(u.trials, u.parts)
    first = part * low + min(part, more)
    m, first, part < more ? low + 1 : low, part
end

"""
Run `f(workspace, unit)` for all units, the threads taking the next one as they finish.

Nobody waits for a thread that has not begun: where others use the machine (threads of torch that spin, say) the system
may take milliseconds to let it run, by which time there may be nothing left to do.
"""
function each_unit(f::F, workspaces::Vector{Workspace{T}}, units::Units, threads::Int) where {F,T}
    count = length(units)
    next = Threads.Atomic{Int}(0)
    helpers = [helper(f, workspaces[k], next, count) for k in 2:min(threads, count, length(workspaces))]
    try
        take_units(f, workspaces[1], next, count)
    finally
        next[] = count  # should this thread have failed
        for (begun, task) in helpers
            Threads.atomic_xchg!(begun, true) && wait(task)
        end
    end
    nothing
end

function take_units(f::F, workspace::Workspace, next::Threads.Atomic{Int}, count::Int) where {F}
    while true
        i = Threads.atomic_add!(next, 1)
        i < count || return nothing
        f(workspace, i)
    end
end

"A task that takes units, unless somebody else says first that it has begun."
function helper(f::F, workspace::Workspace, next::Threads.Atomic{Int}, count::Int) where {F}
    begun = Threads.Atomic{Bool}(false)
    begun, Threads.@spawn(Threads.atomic_xchg!(begun, true) || take_units(f, workspace, next, count))
end
