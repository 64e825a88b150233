# Gradient of a network's mean activity with respect to its weights, from Julia alone:
#
#     julia --project=NeuroSDE.jl examples/dale_network.jl
#
# Expected output (Julia's random numbers differ between versions, so digits do too):
#
#     activity (neuron, trial, network, time) = (100, 8, 1, 200)
#     strongest effect on the mean rate: neuron 30 → neuron 93

using NeuroSDE, Random

Random.seed!(1)
N, trials, steps = 100, 8, 199
signs = [pre <= 80 ? 1.0f0 : -4.0f0 for pre in 1:N]  # 80 excitatory neurons, 20 inhibitory ones
W = abs.(randn(Float32, N, N)) .* signs' ./ sqrt(Float32(N))
h0 = randn(Float32, N, trials)
options = (dt = 0.1, steps = steps, sigma = 0.1, seed = 7)

activity, voltage = simulate(W, h0; options...)
println("activity (neuron, trial, network, time) = ", size(activity))

d_activity = fill(1.0f0 / length(activity), size(activity))  # of the mean rate
effect = gradients(W, h0, d_activity; options...).W
post, pre = Tuple(argmax(abs.(effect)))
println("strongest effect on the mean rate: neuron $pre → neuron $post")
